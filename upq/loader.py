"""Finds `jobs/name.py` with its class `Name`, in files only that others could not have written."""

from __future__ import annotations

import grp
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import pwd
import stat
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from upq.errors import Broken
from upq.params import ParamSpec
from upq.plugins import ATTRIBUTES, UpqJob

#: The private package that job modules live in: a job called `json` is not the library.
PACKAGE = "upq_jobs"


class SourceLoader(importlib.machinery.SourceFileLoader):
    """Reads and writes no `__pycache__`, which others might be able to write."""

    def path_stats(self, path: str) -> NoReturn:
        raise OSError("never cached")


class JobFinder:
    """Imports `upq_jobs.<name>` from one folder, and only files that others cannot change.

    Never looks at sys.path. One at a time is installed, by `Loader`.
    """

    def __init__(self, jobs_dir: Path) -> None:
        self.jobs_dir = jobs_dir

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != PACKAGE or not name:
            return None
        file = self.jobs_dir / f"{name}.py"
        if not file.exists():
            return None
        refuse_unsafe(file, self.jobs_dir)
        loader = SourceLoader(fullname, str(file))
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


def refuse_unsafe(file: Path, jobs_dir: Path) -> None:
    """Raise Broken when anyone but root and this user could have written the file."""
    real = file.resolve()
    if not real.is_relative_to(jobs_dir.resolve()):
        raise Broken(f"{file}: leads out of {jobs_dir}")
    for part in (real, *real.parents):
        info = part.stat()
        sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
        shared = info.st_mode & stat.S_IWGRP and not is_private_group(info.st_uid, info.st_gid)
        if (shared or info.st_mode & stat.S_IWOTH) and not sticky:
            raise Broken(f"{part}: others can write it (chmod go-w)")
        if info.st_uid not in (0, os.getuid()):
            raise Broken(f"{part}: owned by uid {info.st_uid}, not by root or uid {os.getuid()}")


def is_private_group(uid: int, gid: int) -> bool:
    """Whether the group is the user's own, as Debian makes one for each user."""
    try:
        group = grp.getgrgid(gid)
        return group.gr_name == pwd.getpwuid(uid).pw_name and not group.gr_mem
    except KeyError:
        return False


class Loader:
    """Loads job classes from one folder, each guarded: a broken module disables its own type."""

    def __init__(self, jobs_dir: Path) -> None:
        self.jobs_dir = jobs_dir
        self._install()

    def has(self, name: str) -> bool:
        return (self.jobs_dir / f"{name}.py").exists()

    def load(self, name: str) -> type[UpqJob]:
        """The class `Name` of `name.py`. Raises Broken, which names file and line."""
        module_name = f"{PACKAGE}.{name}"
        file = self.jobs_dir / f"{name}.py"
        if not file.exists():
            raise Broken(f"{file}: no such file")
        try:
            module = importlib.import_module(module_name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # even sys.exit() at import breaks only its own type
            raise Broken(blame(error, file)) from error
        found = getattr(module, name[:1].upper() + name[1:], None)
        if not (isinstance(found, type) and issubclass(found, UpqJob)):
            raise Broken(f"{file}: no class {name[:1].upper() + name[1:]}(UpqJob)")
        try:
            found.declared = ParamSpec.of(found, ATTRIBUTES)
        except ValueError as error:
            raise Broken(f"{file}:{line_of(found, str(error))}: {error}") from None
        return found

    def _install(self) -> None:
        """Forget the modules of an earlier loader: a reload finds the files as they are now."""
        for name in [n for n in sys.modules if n.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, JobFinder)]
        package = ModuleType(PACKAGE)
        package.__path__ = [str(self.jobs_dir)]
        sys.modules[PACKAGE] = package
        sys.meta_path.insert(0, JobFinder(self.jobs_dir))


def blame(error: BaseException, file: Path) -> str:
    """`file:line: what`, with the line in the job's own file where there is one."""
    if isinstance(error, Broken):
        return str(error)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    try:
        text = str(error)
    except Exception:  # of the job's own making
        text = "its text cannot be had"
    return f"{raised_at(error, file) or file}: {type(error).__name__}: {text}"


def raised_at(error: BaseException, file: Path) -> str:
    """`file:line` of the job's own code that an error came through last; "" when none did."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if Path(frame.filename).parent == file.parent]
    return f"{lines[-1].filename}:{lines[-1].lineno}" if lines else ""


def line_of(cls: type, fault: str) -> int:
    """The line of the annotation that a fault begins with, else that of the class."""
    try:
        lines, start = inspect.getsourcelines(cls)
    except (OSError, TypeError):
        return 1
    name = fault.partition(":")[0]
    found = [n for n, line in enumerate(lines, start) if line.strip().startswith(f"{name}:")]
    return found[0] if found else start
