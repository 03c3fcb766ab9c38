"""The steps of one task: each with its own status, and done once however often the task starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploylib.settings import TaskError

#: Told of each step as it begins: its number, how many there are, its name.
Report = Callable[[int, int, str], None]

#: Where git and nginx say what is wrong; the last line of theirs is good advice.
REASON = re.compile(r"^fatal: |\[emerg\] ")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Steps:
    """The steps of a task whose folder this is. `steps.log` in it says what has begun and ended.

    A step that has ended is not done again. Its end counts until the machine starts anew: what a
    power cut has left of its files is not known.
    """

    def __init__(self, folder: Path, names: Sequence[str], report: Report) -> None:
        self._log = folder / "steps.log"
        self._names = names
        self._report = report
        self._boot = BOOT_ID.read_text().strip()
        self._ended: dict[str, Any] = {}
        if self._log.exists():
            for line in self._log.read_text().splitlines():
                entry = json.loads(line)
                if "result" in entry and entry["boot"] == self._boot:
                    self._ended[entry["step"]] = entry["result"]

    def do(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """The function's result, which has to be JSON. Raises TaskError with the step's name."""
        self._report(self._names.index(name) + 1, len(self._names), name)
        if name in self._ended:
            return self._ended[name]
        self._write(step=name, began=time.time())
        try:
            result = function(*args)
        except (TaskError, OSError, ValueError) as error:
            self._write(step=name, failed=str(error))
            raise TaskError(f"{name}: {error}") from error
        self._write(step=name, ended=time.time(), result=result, boot=self._boot)
        return result

    def _write(self, **entry: Any) -> None:
        with self._log.open("a") as log:
            log.write(json.dumps(entry) + "\n")


def run(
    argv: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None, uid: int = 0
) -> None:
    """Run a program; what it prints goes to standard error.

    Raises TaskError with its last line, or with that of git and nginx that has the reason.
    """
    done = subprocess.run(
        argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", check=False, **as_user(uid),
    )  # fmt: skip
    sys.stderr.write(done.stdout)
    if done.returncode:
        said = done.stdout.strip().splitlines() or [f"{argv[0]} ended with {done.returncode}"]
        raise TaskError(next(filter(REASON.search, said), said[-1]))


def as_user(uid: int) -> dict[str, Any]:
    """What subprocess is told to run a program as this user; nothing where we may not, or for 0."""
    if uid == 0 or os.geteuid() != 0:
        return {}
    return {"user": uid, "group": uid, "extra_groups": []}


def group_folder(folder: Path, uid: int) -> Path:
    """An empty folder of ours that this user, too, may read: what is made in it gets its group."""
    folder.mkdir(exist_ok=True)
    if as_user(uid):
        os.chown(folder, 0, uid)
        folder.chmod(0o2750)
    return folder


def releases(folder: Path) -> list[int]:
    """The releases that have a folder here, the oldest first."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def forget(folder: Path, release: int, keep: int) -> list[int]:
    """Remove the folders of all releases up to this one but the last `keep`; returns which."""
    known = [number for number in releases(folder) if number <= release]
    old = known[: max(len(known) - keep, 0)]
    for number in old:
        shutil.rmtree(folder / str(number))
    return old


def write_whole(file: Path, text: str, mode: int = 0o644) -> None:
    """Write a file that others see as it was or as it is to be, never half of it."""
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)
        out.flush()
        os.fchmod(out.fileno(), mode)
        os.fsync(out.fileno())
    part.replace(file)
