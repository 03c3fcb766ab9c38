#!/bin/sh
# Runs the tests: test.sh python [arguments of pytest]. Most of them wait more than they work and run
# side by side; those that measure time run afterwards, one by one.
set -u
python=$1
shift

"$python" -m pytest -n 4 --dist worksteal -m "not alone" "$@"
most=$?
"$python" -m pytest -m alone "$@"
alone=$?

# 5 says that the arguments have chosen no test of that part.
[ "$most" = 5 ] && [ "$alone" = 0 ] && most=0
[ "$alone" = 5 ] && alone=0
[ "$most" = 0 ] && exit "$alone"
exit "$most"
