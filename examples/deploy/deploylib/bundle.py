"""From the address of a repository to a tarball with the site and all that it needs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from deploylib import repo as repos
from deploylib.plan import Plan
from deploylib.settings import Settings, TaskError, valid_app
from deploylib.steps import Report, Steps, forget, group_folder, run

STEPS = ["check out", "virtualenv", "install", "verify", "archive"]
REQUIREMENT = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\w,. -]*\])?\s*([<>=!~][\w.*+!<>=~, -]*)?")
IMPORT = "import importlib, sys; getattr(importlib.import_module(sys.argv[1]), sys.argv[2])"
#: For sites that look it up when they are imported; nothing listens there.
NO_DATABASE = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}


def build_bundle(
    settings: Settings, report: Report, *, app: str, release: str, repo: str, zoombuild: str
) -> dict[str, Any]:
    """Steps that have ended are not done again for the same release."""
    plan = Plan.parse(zoombuild)
    folder = settings.folder("build", valid_app(app)) / str(int(release))
    group_folder(folder, settings.first_uid)
    steps = Steps(folder, STEPS, report)
    commit = steps.do("check out", repos.check_out, settings, repo, folder / "site")
    steps.do("virtualenv", _make_environment, settings, folder / "env")
    steps.do("install", _install, settings, plan, folder)
    steps.do("verify", _verify, settings, plan, folder)
    file, sha256, size_bytes = steps.do("archive", _archive, folder)
    for name in "site", "env":
        shutil.rmtree(folder / name, ignore_errors=True)
    forget(folder.parent, int(release), settings.keep)
    return {
        "file": file, "sha256": sha256, "size_bytes": size_bytes, "commit": commit, "steps": STEPS,
    }  # fmt: skip


def _make_environment(settings: Settings, env: Path) -> None:
    run([settings.python, "-m", "venv", "--clear", "--without-pip", str(env)])


def _install(settings: Settings, plan: Plan, folder: Path) -> None:
    """Wheels only: nothing of what is installed runs here."""
    wanted = [settings.server, *_requirements(plan, folder / "site")]
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "env/bin/python")]
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-compile"]
    run([*pip, "install", *options, "--only-binary", ":all:", *settings.pip, *wanted])


def _requirements(plan: Plan, site: Path) -> list[str]:
    """Names of packages and nothing else: no options, no addresses, no folders to be built."""
    if not plan.requirements:
        return []
    file = (site / plan.requirements).resolve()
    if not file.is_relative_to(site.resolve()):
        raise TaskError(f"{plan.requirements} leads out of the repository")
    found = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    for line in found:
        if line and not REQUIREMENT.fullmatch(line):
            raise TaskError(f"{plan.requirements}: {line!r} is no name of a package")
    return [line for line in found if line]


def _verify(settings: Settings, plan: Plan, folder: Path) -> None:
    """Import the site, as a user who can do no harm."""
    python = str(folder / "env/bin/python")
    env = {**os.environ, **NO_DATABASE, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    run([python, "-c", IMPORT, *plan.wsgi.split(":")], folder / "site", env, settings.first_uid)


def _archive(folder: Path) -> tuple[str, str, int]:
    part, file = folder / "bundle.part", folder / "bundle.tar.gz"
    with tarfile.open(part, "w:gz", compresslevel=1) as archive:
        for name in "site", "env":
            archive.add(folder / name, arcname=name)
    part.rename(file)
    return str(file), sha256_of(file), file.stat().st_size


def sha256_of(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def extract(file: Path, sha256: str, folder: Path) -> None:
    """The bundle's `site` and `env` into a folder. Raises TaskError for another bundle."""
    if sha256_of(file) != sha256:
        raise TaskError(f"{file} is not the bundle {sha256}")
    for name in "site", "env":
        shutil.rmtree(folder / name, ignore_errors=True)
    # Debian 12's Python has no filters yet, later ones refuse the link to the system's Python.
    trusted: dict[str, Any] = {"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(file) as archive:
        archive.extractall(folder, [_checked(member) for member in archive], **trusted)


def _checked(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The member, if nothing of it leads out, but for the link to the system's Python that an
    environment has. Raises TaskError.
    """
    places = [member.name]
    if member.islnk():
        places.append(member.linkname)
    elif member.issym() and not re.fullmatch(r"env/bin/python[\d.]*", member.name):
        places.append(os.path.join(os.path.dirname(member.name), member.linkname))
    leads_out = any(os.path.normpath(place).split("/")[0] in ("", "..") for place in places)
    if leads_out or not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        raise TaskError(f"the bundle leads out of its folder: {member.name}")
    # -1 leaves the owners as they are made: the folder says for which group.
    member.uid, member.gid, member.uname, member.gname = -1, -1, "", ""
    member.mode = 0o2755 if member.isdir() else member.mode & 0o755
    return member
