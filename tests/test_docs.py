"""README.md and docs/*.md are true: what they tell to type is typed, what they show is what comes.

A page is worked through from top to bottom in a copy of the project:

* `console`: lines after `$ ` are run, what stands below is what they print. Numbers stand for any
  number, `...` for any text.
* `sh` is run as a whole, `php` too. `python` is run, or becomes `jobs/name.py` when it is the class
  of a job; `ini` joins upq.cfg when it is of jobs and schedules only, else it is checked by
  itself.
* `sql` is for a fresh database server; the `ini` after it is then how a daemon reaches that one.
* Folders of the system are replaced by some below the copy.
* `text` and what `<!-- not run: reason -->` stands before are for reading only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.conftest import unavailable
from tests.daemons import Daemon, until
from tests.servers import MariaDB, Postgres, short_folder
from tests.test_layers import FLOORS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CHANGELOG.md"]

#: What would take long or never end, and what is run for it.
INSTEAD = {
    "make demo": "make demo ARGS='--jobs 60'",
    "make test": "make test ARGS='-q -n 0 -p no:cacheprovider tests/test_when.py'",
}
PROGRAMS = {"nc": "netcat-openbsd", "php": "php-cli"}
#: What secrets of examples are taken from.
SECRETS = {"UPQ_DB_PASSWORD": "choose-one", "GREETING_KEY": "hello"}
SYSTEM = re.compile(r"(?<![\w./])/(?=(?:etc|opt|run|srv|usr|var)/)(?!etc/(?:hostname|passwd))")
BLOCK = re.compile(
    r"(?:^<!-- (?P<not_run>not run: .+?) -->\n+)?"
    r"(?:^```(?P<kind>\w*)\n(?P<fenced>.*?)^```$"
    r"|(?<=\n\n)(?P<indented>    \$ [^\n]+\n(?:    [^\n]*\n)*))",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    page: str
    line: int
    kind: str
    text: str
    not_run: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The code of a page in its order."""
    text = page.read_text()
    name = str(page.relative_to(ROOT))
    return [
        Block(
            name,
            text.count("\n", 0, match.start()) + 1,
            match["kind"] or ("console" if match["indented"] else ""),
            match["fenced"] or textwrap.dedent(match["indented"] or ""),
            match["not_run"] or "",
        )
        for match in BLOCK.finditer(text)
    ]


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if not block.not_run and block.kind != "text"]


@dataclass
class World:
    """A copy of the project, in which a reader follows a page."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        ignored = shutil.ignore_patterns("var", ".*", "__pycache__")
        shutil.copytree(ROOT, self.folder, ignore=ignored, symlinks=True)
        for path in [self.folder, *self.folder.rglob("*")]:
            if not path.is_symlink():
                path.chmod(
                    path.stat().st_mode & ~0o022
                )  # upq loads no job that others could change
        venv, bin_ = self.folder / ".venv", self.folder / "bin"
        venv.mkdir()
        bin_.mkdir()
        for path in Path(sys.prefix).iterdir():
            if not path.name.endswith(".stamp"):
                (venv / path.name).symlink_to(path)
        for stamp in "core.stamp", "dev.stamp":
            (venv / stamp).touch()
        for made in "etc/upq", "usr/bin", "usr/share":
            (self.folder / "system" / made).mkdir(parents=True)
        (self.folder / "system/etc/upq/mail-password").touch(0o600)
        (bin_ / "upq-cli").symlink_to("../upq-cli")
        (bin_ / "upq").write_text(f'#!/bin/sh\nexec {venv}/bin/python {self.folder}/upq.py "$@"\n')
        (bin_ / "upq").chmod(0o755)

    @property
    def env(self) -> dict[str, str]:
        # Make's own, too: a reader's `make run` is not below the `make test` that runs this.
        foreign = ("UPQ_", "MAKE", "MFLAGS", "ARGS")
        env = {name: text for name, text in os.environ.items() if not name.startswith(foreign)}
        path = f"{self.folder}/bin:{self.folder}/.venv/bin:{os.environ['PATH']}"
        own = {"PATH": path, "HOME": str(self.folder), "PYTHONPATH": "", "COLUMNS": "200"}
        return {**env, **SECRETS, **own}

    def sh(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run it as a reader would, with errors among the output."""
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=250, check=False,
        )  # fmt: skip

    def start(self) -> None:
        """`make run`, until it answers."""
        with open(self.folder / "stderr", "ab") as said:
            daemon = subprocess.Popen(
                ["make", "run"], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
                stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        self.processes.append(daemon)
        until(lambda: self.sh("./upq-cli ping").returncode == 0)

    def register(self, files: int) -> None:
        """Give the catalogue so many files, so that there is a fid 50."""
        found = [path for name in ("tests", "upq") for path in (self.folder / name).glob("*.py")]
        assert len(found) >= files
        lines = "".join(f"new_file file:{path}\\n" for path in found[:files])
        done = self.sh(f"printf '{lines}' | ./upq-cli --wait -")
        assert done.returncode == 0, done.stdout

    @property
    def is_running(self) -> bool:
        return bool(self.processes)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder)

    # Blocks

    def follow(self, block: Block) -> None:
        """Do what a block says. AssertionError tells what came instead."""
        text = SYSTEM.sub(f"{self.folder}/system/", block.text)
        text = re.sub(r"^(uid|gid) = upq$", lambda m: f"{m[1]} = {os.getuid()}", text, flags=re.M)
        getattr(self, f"do_{block.kind}")(replace(block, text=text))

    def do_sh(self, block: Block) -> None:
        lines = [line.partition("  #")[0].strip() for line in block.text.splitlines()]
        done = self.sh("\n".join(INSTEAD.get(line, line) for line in lines))
        assert done.returncode == 0, f"{block}: {done.stdout}"

    def do_console(self, block: Block) -> None:
        for command, shown in commands(block.text):
            if command == "make run &":
                self.start()
                continue
            for program, package in PROGRAMS.items():
                if re.search(rf"\b{program} ", command) and not shutil.which(program):
                    unavailable(f"no program {program} (Debian: apt-get install {package})")
            done = self.sh(command)
            assert done.returncode == 0 or "ERR " in shown or " failed" in shown, (
                f"{block}: {command}: exit status {done.returncode}: {done.stdout}"
            )
            assert fits(shown, done.stdout), f"{block}: {command}\n{done.stdout}\nnot\n{shown}"

    def do_php(self, block: Block) -> None:
        if not shutil.which("php"):
            unavailable("no program php (Debian: apt-get install php-cli)")
        (self.folder / "page.php").write_text(f"<?php\n{block.text}")
        done = self.sh("php page.php")
        assert done.stdout.startswith("ACK "), f"{block}: {done.stdout}"

    def do_python(self, block: Block) -> None:
        named = re.search(r"^class (\w+)\(\w*(?:UpqJob|CatalogueJob)\):", block.text, re.MULTILINE)
        if named:
            (self.folder / f"jobs/{named[1].lower()}.py").write_text(block.text)
            return
        (self.folder / "page.py").write_text(block.text)
        done = self.sh("python page.py")
        assert done.returncode == 0, f"{block}: {done.stdout}"

    def do_ini(self, block: Block) -> None:
        sections = re.findall(r"^\[(.+)\]", block.text, re.MULTILINE)
        of_jobs = all(name.startswith(("job ", "schedule ")) for name in sections)
        includes = self.folder / "upq.d"
        file = includes / f"{block.line}.cfg" if of_jobs else self.folder / "page.cfg"
        includes.mkdir(exist_ok=True)
        file.write_text(block.text)
        checked = self.sh(f"upq --check -c {'upq.cfg' if of_jobs else 'page.cfg'}")
        assert checked.returncode == 0, f"{block}: {checked.stdout}"
        if of_jobs and self.is_running:
            done = self.sh("./upq-cli reload")
            assert done.returncode == 0, f"{block}: {done.stdout}"


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command after `$ ` with what is shown below it."""
    assert text.startswith("$ "), text
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def fits(shown: str, printed: str) -> bool:
    """Whether that was printed, with other numbers and other homes maybe."""
    pattern = re.escape(shown.rstrip())
    pattern = re.sub(r"[0-9]+", "[0-9]+", pattern)
    pattern = pattern.replace(r"\.\.\.", ".*").replace(re.escape("/home/you/upq/"), r"\S*/")
    return re.fullmatch(pattern, printed.rstrip(), re.DOTALL) is not None


@pytest.fixture
def world() -> Iterator[World]:
    folder = short_folder()
    made = World(folder / "upq")
    try:
        yield made
    finally:
        made.close()
        folder.rmdir()


# What pages tell to do


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_tells_to_do_can_be_done(page: Path, world: World) -> None:
    todo = [block for block in runnable(page) if block.kind != "sql"]
    if not todo:
        return
    if page.name != "README.md":
        world.start()
    if any("fid:50" in block.text for block in todo):
        world.register(50)
    for block in todo:
        world.follow(block)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("console", "$ echo yes\nno\n"),
        ("console", "$ false\n"),
        ("sh", "true\nfalse\ntrue\n"),
        ("python", "from upq import Nothing\n"),
        ("ini", "[job test]\nconcurent = two\nconcurrent = two\n"),
        ("ini", "[deamon]\n"),
    ],
)
def test_a_page_that_tells_what_is_not_so_is_found_out(kind: str, text: str, world: World) -> None:
    with pytest.raises(AssertionError):
        world.follow(Block("page.md", 1, kind, text, ""))


def test_numbers_and_what_is_left_out_may_differ_and_nothing_else() -> None:
    assert fits("ACK 17\n", "ACK 3\n")
    assert fits("/home/you/upq/a ... b", "/tmp/x/a 1\n2 b")
    assert not fits("ACK 17\n", "ACK 17 queued\n")
    assert not fits("", "ERR\n")


def test_nearly_all_can_be_run() -> None:
    left_out = [block for page in PAGES for block in blocks(page) if block.not_run]
    assert len(left_out) <= 2, left_out
    kinds = {block.kind for page in PAGES for block in blocks(page)}
    assert kinds <= {"console", "ini", "php", "python", "sh", "sql", "text"}


@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_a_daemon_works_on_a_database_made_as_install_tells(
    kind: str, request: pytest.FixtureRequest, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is one of the tests' own; its socket is in another place."""
    server: Postgres | MariaDB = request.getfixturevalue(kind)
    server.start()
    words, usual, own = {
        "postgres": ("CREATE ROLE", "/run/postgresql", str(server.folder)),
        "mariadb": ("IDENTIFIED BY", "/run/mysqld/mysqld.sock", f"{server.folder}/socket"),
    }[kind]
    page = blocks(ROOT / "docs/install.md")
    at = next(n for n, block in enumerate(page) if block.kind == "sql" and words in block.text)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    try:
        for statement in filter(str.strip, page[at].text.split(";")):
            server.execute(statement)
        config = page[at + 1].text
        assert usual in config
        with Daemon(short_tmp, config.replace(usual, own) + "[job test]\n") as daemon:
            assert daemon.run("test result:here")["result"] == "here"
            daemon.end()
    finally:
        server.drop_database("upq")
        server.execute({"postgres": "DROP ROLE upq", "mariadb": "DROP USER upq@localhost"}[kind])


# What pages say


def anchor(heading: str) -> str:
    """The name that a heading has for links."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, heading = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.is_file(), target
        assert not heading or heading in anchors(there.read_text()), target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)\)", (ROOT / "README.md").read_text()))
    assert linked == {str(page.relative_to(ROOT)) for page in PAGES[1:]}


def test_the_first_screen_says_what_it_is_how_it_is_tried_and_what_is_promised() -> None:
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:48])
    job = next(block for block in blocks(ROOT / "README.md") if block.kind == "python")
    assert len([line for line in job.text.splitlines() if line.strip()]) <= 10
    for said in (
        "make demo",
        "make test",
        job.text,
        "[job ",
        "ACK 1\n",
        "**Promised",
        "**Not promised",
    ):
        assert said in screen


def test_promises_are_shown_by_tests_that_there_are() -> None:
    page = (ROOT / "docs/promises.md").read_text()
    named = set(re.findall(r"tests/\w+\.py", page))
    assert named and all((ROOT / name).is_file() for name in named), named
    numbers = {int(n) for n in re.findall(r"\(P(\d+);", page)}
    assert numbers == {1, 2, 3, 5, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18, 19}


@pytest.mark.parametrize(
    ("example", "system", "checks"),
    [("containers", "OVZ", 17), ("storage", "ISA", 16), ("deploy", "DJZ", 24)],
)
def test_an_example_has_a_line_and_a_test_for_each_check(
    example: str, system: str, checks: int
) -> None:
    page = (ROOT / f"examples/{example}/README.md").read_text()
    told = re.findall(rf"^\| {system}-([0-9]+) \| .+ \|$", page, re.MULTILINE)
    assert told == [f"{number:02}" for number in range(1, checks + 1)]
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(rf"^def test_{system.lower()}((?:_and|_[0-9]+)+)_", tests, re.MULTILINE)
    assert sorted({number for name in named for number in re.findall("[0-9]+", name)}) == told


def test_the_architecture_page_has_the_floors_as_they_are() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", page, re.MULTILINE)
    told = {int(floor): set(re.findall(r"`(\w+)`", files)) for floor, files in rows}
    assert told == {floor: set(files.split()) for floor, files in enumerate(FLOORS, 1)}


# The service


def test_the_daemon_starts_with_the_system_calls_that_its_unit_allows(short_tmp: Path) -> None:
    """What `SystemCallFilter=~@privileged` answers, strace answers here."""
    if not shutil.which("strace"):
        unavailable("no program strace (Debian: apt-get install strace)")
    assert "SystemCallFilter=~@privileged\n" in (ROOT / "packaging/upq.service").read_text()
    privileged = "setuid,setgroups,setresuid,setreuid,setfsuid,setfsgid,chroot,chown,fchown,capset"
    daemon = Daemon(short_tmp, "[job test]")
    trace = ["strace", "-f", "-qq", "-o", f"{short_tmp}/trace", "-e", f"trace={privileged}"]
    command = [*trace, f"--inject={privileged}:error=EPERM", *daemon.command("--foreground")]
    daemon.command = lambda *_: command  # type: ignore[method-assign]
    daemon.start()
    os.kill(daemon.ask("status")["pid"], signal.SIGTERM)
    assert daemon.until_ended() == 0
