#!/bin/sh
# Renews requirements/core.txt and requirements/dev.txt: pins.sh [python]
set -eu
cd "$(dirname "$0")/.."

venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"${1:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
write() {
    printf '# %s Renewed by: make pins\n' "$2" >"requirements/$1"
    pip freeze --exclude upq >>"requirements/$1"
}

pip install --upgrade pip # --group is younger than the pip that comes with Python 3.11
pip install .
write core.txt "What upq needs to run."
pip install --group dev
write dev.txt "What upq needs to be tested and built: core.txt and more."
