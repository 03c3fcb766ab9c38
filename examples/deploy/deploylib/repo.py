"""Repositories: checked out, and looked at to guess how the site in it is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from deploylib.settings import Settings
from deploylib.steps import Report, Steps, run

SETTINGS_MODULE = re.compile(r"""DJANGO_SETTINGS_MODULE["'],\s*["']([\w.]+)["']""")
CALLABLE = re.compile(r"^(?:def )?(application|app)\b\s*[=(]", re.MULTILINE)
REQUIREMENTS = ("requirements.txt", "requirements/production.txt", "requirements/base.txt")


def check_out(settings: Settings, repo: str, target: Path) -> str:
    """Its newest commit into a folder, whole or not at all; returns the commit's name."""
    part = target.with_name(f"{target.name}.part")
    for folder in (part, target):
        shutil.rmtree(folder, ignore_errors=True)
    # No transport that runs a program, and nobody to type a password.
    rules = {"GIT_ALLOW_PROTOCOL": settings.protocols, "GIT_TERMINAL_PROMPT": "0"}
    clone = ["git", "clone", "-q", "--depth", "1", "--", repo, str(part)]
    run(clone, env={**os.environ, **rules})
    head = ["git", "-C", str(part), "rev-parse", "HEAD"]
    commit = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
    shutil.rmtree(part / ".git")
    part.rename(target)
    return commit


def inspect_repo(settings: Settings, report: Report, *, repo: str) -> dict[str, Any]:
    """The guesses for a repository, made from a copy that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=settings.folder("inspect")) as folder:
        steps = Steps(Path(folder), ["check out", "inspect"], report)
        commit = steps.do("check out", check_out, settings, repo, Path(folder) / "source")
        return {"commit": commit, **steps.do("inspect", guess, Path(folder) / "source")}


def guess(source: Path) -> dict[str, Any]:
    """How the site in a folder is most likely run; `zoombuild` is a draft of zoombuild.cfg."""
    manage = source / "manage.py"
    is_django = manage.exists()
    found = SETTINGS_MODULE.search(manage.read_text()) if is_django else None
    requirements = [name for name in REQUIREMENTS if (source / name).exists()]
    apps = sorted(path.parent.name for path in source.glob("*/migrations/"))
    guesses: dict[str, Any] = {
        "kind": "django" if is_django else "wsgi",
        "settings": found[1] if found else "",
        "wsgi": _callable(source),
        "requirements": requirements[0] if requirements else "",
        "apps": apps,
        "hooks": ["syncdb", *(["migrate"] if apps else [])] if is_django else [],
    }
    return {**guesses, "zoombuild": _draft(guesses)}


def _callable(source: Path) -> str:
    """`module:name` of the first file that has a WSGI callable, by the usual names first."""
    names = ["wsgi.py", "app.py", "main.py"]
    for path in [
        p for name in names for p in sorted((*source.glob(name), *source.glob(f"*/{name}")))
    ]:
        if match := CALLABLE.search(path.read_text()):
            module = ".".join(path.relative_to(source).with_suffix("").parts)
            return f"{module}:{match[1]}"
    return ""


def _draft(guesses: dict[str, Any]) -> str:
    lines = [
        "[site]",
        "hosts = ",
        f"wsgi = {guesses['wsgi']}",
        f"requirements = {guesses['requirements']}",
        f"hooks = {' '.join(guesses['hooks'])}",
    ]
    return "\n".join(lines) + "\n"
