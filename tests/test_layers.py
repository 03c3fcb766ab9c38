"""Keeps the architecture so: files import from lower floors only; input never becomes code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: A file of upq/ imports only from floors below its own.
FLOORS = (
    "errors job when events clock log systemd interrupt pipes shim trees cgroup secret",
    "access params wire gates rates spawn steps webhook whole output",
    "protocol plugins notify schema client draws vault screen",
    "command health keeper migrations workflow loader",
    "db cli sql kinds ini",
    "clauses declaration",
    "writer statements jobsettings",
    "limits joins record changes alerts drawing settings",
    "members sections",
    "family dependents jobsection followers timetable",
    "batch",
    "filling nodes",
    "config queue views attempt",
    "jobtypes child difference retention slots lists",
    "executor",
    "process",
    "runner schedule intake",
    "pool",
    "claimer",
    "census",
    "desk reasons",
    "overview",
    "dispatcher",
    "lobby",
    "server",
    "daemon",
    "launch",
    "__init__ __main__",
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}

BANNED_MODULES = {"dill", "marshal", "pickle", "shelve"}
BANNED_NAMES = {"eval", "exec"}
BANNED_MEMBERS = {("builtins", "eval"), ("builtins", "exec"), ("os", "system"), ("yaml", "load")}


def noun(path: Path) -> str:
    """The name that has a floor: a file's, or that of the folder that it grew into."""
    return path.relative_to(ROOT / "upq").parts[0].removesuffix(".py")


def modules(node: ast.AST) -> Iterator[str]:
    """The modules that an import statement names, dotted; relative ones as seen from upq/."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = ".".join(filter(None, ["upq" if node.level else "", node.module]))
        yield from (f"{module}.{alias.name}" for alias in node.names)


def imports(source: str) -> set[str]:
    """The files of upq that the source imports, wherever the statement stands.

    The version does not count: it stands in the package itself, for all to read.
    """
    dotted = [name.split(".") for node in ast.walk(ast.parse(source)) for name in modules(node)]
    return {
        parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"
        for parts in dotted
        if parts[0] == "upq" and parts != ["upq", "__version__"]
    }


def upward(name: str, source: str) -> set[str]:
    """What a file called `name` imports and should not."""
    return {other for other in imports(source) if FLOOR[other] >= FLOOR[name]}


def banned(source: str) -> list[str]:
    """What the source does that could turn data into code, as `line: what`."""
    return [
        f"{getattr(node, 'lineno', 0)}: {what}"
        for node in ast.walk(ast.parse(source))
        for what in banned_in(node)
    ]


def banned_in(node: ast.AST) -> Iterator[str]:
    for name in modules(node):
        top, _, rest = name.partition(".")
        if top in BANNED_MODULES or (top, rest) in BANNED_MEMBERS:
            yield name
    match node:
        case ast.Name(id=name) if name in BANNED_NAMES:
            yield name
        case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in BANNED_MEMBERS:
            yield f"{owner}.{name}"
        case ast.keyword(arg="shell", value=value):
            if not (isinstance(value, ast.Constant) and value.value is False):
                yield "shell="


@pytest.mark.parametrize("path", sorted((ROOT / "upq").rglob("*.py")), ids=noun)
def test_a_file_imports_from_lower_floors_only(path: Path) -> None:
    assert noun(path) in FLOOR, "a file of upq/ that is on no floor"
    assert upward(noun(path), path.read_text()) == set()


@pytest.mark.parametrize(
    "path",
    sorted(path for folder in ("upq", "jobs") for path in (ROOT / folder).rglob("*.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_turns_input_into_code(path: Path) -> None:
    assert banned(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from upq.daemon import main",
        "from upq import daemon",
        "import upq.daemon as d",
        "from .daemon import main",
        "from . import daemon",
        "def f():\n    from upq.daemon import main",
        "if TYPE_CHECKING:\n    from upq.daemon import main",
    ],
)
def test_an_upward_import_is_seen_wherever_it_stands(source: str) -> None:
    assert upward("server", source) == {"daemon"}


def test_an_import_from_the_same_floor_is_upward() -> None:
    assert upward("runner", "from upq.dispatcher import submit") == {"dispatcher"}
    assert upward("runner", "from upq.queue import Queue") == set()


def test_nothing_in_upq_imports_the_package_itself_but_for_its_version() -> None:
    assert upward("daemon", "from upq import __version__") == set()
    for source in "import upq", "from upq import UpqJob", "from . import UpqJob":
        assert upward("daemon", source) == {"__init__"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "def f():\n    import shelve",
        "eval(x)",
        "list(map(eval, x))",
        "exec(x)",
        "builtins.exec(x)",
        "yaml.load(x)",
        "from yaml import load",
        "os.system(x)",
        "from os import system",
        "run(x, shell=True)",
        "run(x, shell=maybe)",
    ],
)
def test_each_banned_way_is_seen(source: str) -> None:
    assert len(banned(source)) == 1


@pytest.mark.parametrize(
    "source", ["run(x, shell=False)", "job.exec()", "yaml.safe_load(x)", "import json, os.path"]
)
def test_what_only_looks_like_it_is_let_through(source: str) -> None:
    assert banned(source) == []
