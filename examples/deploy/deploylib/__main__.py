"""One task from the command line: `python -m deploylib measure server=1`.

deploy.ini is that of the current folder. `name=-` reads a value from standard input. Progress and,
in the end, the result as one line of JSON go to standard output; the last line on standard error
says why a task has failed.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploylib.appserver import deploy, manage, measure, retire
from deploylib.bundle import build_bundle
from deploylib.proxy import proxy_update
from deploylib.repo import inspect_repo
from deploylib.settings import Settings, TaskError
from deploylib.store import bundle_upload

TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    task.__name__: task
    for task in (
        inspect_repo, build_bundle, bundle_upload, deploy, manage, proxy_update, retire, measure,
    )
}  # fmt: skip


def report(number: int, total: int, name: str) -> None:
    print(f"progress: {number}/{total} {name}", flush=True)


def main(argv: Sequence[str]) -> int:
    os.umask(0o027)
    task, *words = argv or [""]
    if task not in TASKS:
        print(f"python -m deploylib TASK name=value...; tasks: {' '.join(TASKS)}", file=sys.stderr)
        return 64
    given = {name: value for name, _, value in (word.partition("=") for word in words)}
    try:
        inspect.signature(TASKS[task]).bind(None, report, **given)
    except TypeError as error:
        print(f"{task}: {error}", file=sys.stderr)
        return 64
    for name, value in given.items():
        if value == "-":
            given[name] = sys.stdin.read()
    try:
        result = TASKS[task](Settings.read(Path("deploy.ini")), report, **given)
    except TaskError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
