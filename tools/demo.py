#!/usr/bin/env python3
"""See upq at work: real files verified, one of them damaged, the daemon killed with -9 in between.

Everything happens in a folder of its own with a daemon of its own; another one is never touched.
The exit status is 1 when a job was lost or ended otherwise than it should.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Copies of the project's own files are what gets verified.
SOURCES = ("upq", "jobs", "tests", "docs", "packaging")
FILES = 60
DAMAGED_FID = 17
#: They keep the daemon busy until it is killed; each needs the one place of its type.
SLOW = ["test sleep:1"] * 5
#: How long the demo waits for the daemon to do anything.
PATIENCE_S = 60.0
#: Settings of the caller's that would lead to another daemon than the demo's.
FOREIGN = ("UPQ_", "NOTIFY_", "LISTEN_", "WATCHDOG_")


class Demo:
    """One run, in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        env = {name: text for name, text in os.environ.items() if not name.startswith(FOREIGN)}
        self.env = {**env, "UPQ_CONFIG": str(folder / "upq.cfg")}
        self.daemon: subprocess.Popen[bytes] | None = None
        #: Ids that an ACK promised.
        self.accepted: set[int] = set()
        self.refused = 0

    def run(self, load: int) -> bool:
        """The whole story; whether all went as it should."""
        self.lay_out()
        self.say("Start the daemon.")
        self.start()

        self.say(f"Register {FILES} real files; upq.cfg has each one hashed right after.")
        self.submit_file("new", [f"new_file file:{path}" for path in self.files()])
        self.until(all_ended)

        self.say("Flip one bit in one of them, as a bad disk would, and verify them all.")
        self.damage(DAMAGED_FID)
        for id in self.submit("verify_local_file fid:50"):
            self.cli(f"wait {id}")
        verify = [f"verify_local_file fid:{1 + n % FILES}" for n in range(max(load, FILES))]
        self.submit_file("verify", verify[:FILES])
        self.until(all_ended)
        for failed in self.cli("-q", "jobs state:failed").split():
            self.cli(f"wait {failed}")

        self.say(f"Give it {load:,} more verifications and {len(SLOW)} slow jobs; kill it midway.")
        enough = self.ask("status")["jobs"]["done"] + load // 4
        self.submit_file("load", [*SLOW, *verify[:load]])
        self.until(lambda jobs: jobs["done"] >= enough)
        self.kill9()

        self.say("Start it again. It goes on by itself.")
        self.start()
        self.until(all_ended)
        return self.balance()

    # What a user would type

    def start(self) -> None:
        """Start the daemon, and show what its log has to say until it is ready."""
        log = self.folder / "var/upq.log"
        known = len(log.read_bytes()) if log.exists() else 0
        self.show("./upq.py &", prompt="$ ")
        command = [sys.executable, str(ROOT / "upq.py"), "--foreground"]
        self.daemon = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL)
        deadline_s = time.monotonic() + PATIENCE_S
        said = ""
        while " ready in " not in said:
            if self.daemon.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"demo: the daemon does not start\n{said}")
            time.sleep(0.02)
            said = log.read_bytes()[known:].decode() if log.exists() else ""
        for line in said.splitlines():
            if " ready in " in line or "unfinished jobs" in line:
                self.show(line)

    def kill9(self) -> None:
        assert self.daemon
        left = open_jobs(self.ask("status")["jobs"])
        self.show(f"kill -9 {self.daemon.pid}", prompt="$ ")
        self.daemon.kill()
        self.daemon.wait()
        self.show(f"(with {left:,} jobs still to be done)")

    def submit(self, *words: str, stdin: Path | None = None, lines: int = 1) -> list[int]:
        """Run upq-cli and take down the ids of what was accepted."""
        replies = self.cli(*words, stdin=stdin).splitlines()
        ids = [int(reply.split()[1]) for reply in replies if reply.startswith("ACK ")]
        self.accepted |= set(ids)
        self.refused += lines - len(ids)
        return ids

    def submit_file(self, name: str, lines: Sequence[str]) -> None:
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines))
        self.submit("-", stdin=path, lines=len(lines))

    def cli(self, *words: str, stdin: Path | None = None) -> str:
        """Show a command, run it, show how its output begins and ends; returns all of it."""
        typed = ["./upq-cli", *(f'"{word}"' if ":" in word else word for word in words)]
        self.show(" ".join([*typed, f"< {stdin}"] if stdin else typed), prompt="$ ")
        with open(stdin or os.devnull) as given:
            done = subprocess.run(
                [sys.executable, str(ROOT / "upq-cli"), *words],
                stdin=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=self.env, text=True, check=False,
            )  # fmt: skip
        self.show(done.stdout)
        return done.stdout

    # What happens behind the stage

    def lay_out(self) -> None:
        """The shipped configuration and jobs, and the files."""
        sources = [path for name in SOURCES for path in sorted((ROOT / name).rglob("*"))]
        real = [p for p in sources if p.is_file() and p.stat().st_size and p.suffix != ".pyc"]
        copy((ROOT / "jobs").glob("*.py"), self.folder / "jobs", ROOT / "jobs")
        copy([ROOT / "upq.cfg"], self.folder, ROOT)
        copy(real[:FILES], self.folder / "files", ROOT)
        print(f"$ DIR={self.folder}; export UPQ_CONFIG=$DIR/upq.cfg", flush=True)

    def files(self) -> list[Path]:
        return sorted((self.folder / "files").iterdir())

    def damage(self, fid: int) -> None:
        hashed = self.ask(f"jobs type:hash limit:{FILES}")["jobs"]
        (path,) = [job["params"]["file"] for job in hashed if job["params"]["fid"] == fid]
        with open(path, "r+b") as file:
            byte = file.read(1)[0]
            file.seek(0)
            file.write(bytes([byte ^ 1]))
        self.show(f"(the first byte of {path})")

    def ask_all(self, verbs: Iterable[str]) -> Iterator[Any]:
        """What control verbs answer: a line to the socket, a line back; {} for an ERR."""
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.settimeout(PATIENCE_S)
            daemon.connect(str(self.folder / "var/upq.sock"))
            replies = daemon.makefile()
            for verb in verbs:
                daemon.sendall(f"{verb}\n".encode())
                word, _, answer = replies.readline().partition(" ")
                yield json.loads(answer) if word == "OK" else {}

    def ask(self, verb: str) -> Any:
        return next(self.ask_all([verb]))

    def until(self, holds: Callable[[dict[str, int]], bool]) -> None:
        """Wait until that holds for the counts of jobs by state; if never, the ledger tells."""
        moved_s, before = time.monotonic(), {}
        while not holds(jobs := self.ask("status")["jobs"]):
            if jobs != before:
                moved_s, before = time.monotonic(), jobs
            if time.monotonic() - moved_s > PATIENCE_S:
                self.show("(nothing has moved for too long)")
                return
            time.sleep(0.01)

    def balance(self) -> bool:
        """Print the ledger: each id that got an ACK, and each hash job, has to be accounted for."""
        shown = self.ask_all(f"show {id}" for id in sorted(self.accepted))
        promised = [job for one in shown if one for job in (one["job"], *one["children"])]
        done = sum(job["state"] == "done" for job in promised)
        failed = [job for job in promised if job["state"] == "failed"]
        meant = sum(job["params"].get("fid") == str(DAMAGED_FID) for job in failed)
        lost = len(self.accepted) + FILES - done - len(failed)
        again = sum(job["starts"] > 1 for job in promised)
        self.say("The ledger.")
        for name, count, meaning in (
            ("accepted", len(self.accepted), "lines that got an ACK"),
            ("followed", FILES, "hash jobs, one after each new_file"),
            ("done", done, ""),
            ("failed on purpose", meant, f"the damaged file, fid {DAMAGED_FID}, each time"),
            ("failed otherwise", len(failed) - meant, ""),
            ("refused", self.refused, ""),
            ("lost", lost, ""),
            ("started twice", again, "they ran when the daemon was killed"),
        ):
            print(f"  {name:<18}{count:>6,}   {meaning}".rstrip())
        return not lost and not self.refused and len(failed) == meant > 0

    def close(self) -> None:
        """End the daemon, whatever state it is in."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(5)
            except subprocess.TimeoutExpired:
                self.daemon.kill()

    # What is printed

    def show(self, text: str, prompt: str = "  ") -> None:
        """Print some lines, or how they begin and end."""
        lines = text.replace(str(self.folder), "$DIR").splitlines()
        if len(lines) > 4:
            lines = [*lines[:2], f"... ({len(lines):,} lines)", lines[-1]]
        for line in lines:
            print(f"{prompt}{line}", flush=True)

    def say(self, text: str) -> None:
        print(f"\n# {text}", flush=True)


def open_jobs(jobs: dict[str, int]) -> int:
    return sum(jobs[state] for state in ("queued", "blocked", "running"))


def all_ended(jobs: dict[str, int]) -> bool:
    return not open_jobs(jobs)


def copy(paths: Iterable[Path], folder: Path, base: Path) -> None:
    """Copy files flat, writable for nobody else: upq loads no job that others could change."""
    folder.mkdir(exist_ok=True)
    for path in paths:
        shutil.copyfile(path, folder / "-".join(path.relative_to(base).parts))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1000,
        help="verifications in the load (%(default)s, at most 9000)",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.umask(0o022)
    # The path of a UNIX socket has to be short.
    place = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="upq-demo-", dir=place))
    began_s = time.monotonic()
    demo = Demo(folder)
    try:
        went_well = demo.run(args.jobs)
    finally:
        demo.close()
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\nThis took {time.monotonic() - began_s:.0f} s.", end=" ")
    if args.keep:
        print(f"{folder} is kept: ./upq.py -c {folder}/upq.cfg starts its daemon again.")
    else:
        print(f"{folder} is removed; `make demo ARGS=--keep` keeps it to be looked at.")
    return 0 if went_well else 1


if __name__ == "__main__":
    sys.exit(main())
