"""T13 and T14: what poison and hanging jobs cost the others, and how soon they are over.

python -m tests.hangs

Prints a line for each figure with its goal; the exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench import percentile, report
from tests.daemons import Daemon, until
from tests.servers import short_folder
from tests.test_ends import HANG

#: Seconds that each hanging job may take, and that upq may take on top to end or declare it.
TIMEOUT_S, ON_TOP_S = 3, 6
#: Seconds between two jobs of the others.
EVERY_S = 0.02
#: How often they are looked at with nothing beside them, and with poison: what else the machine
#: does changes from minute to minute. Goals are for the median of the rounds.
ROUNDS = 5
HOWS = ("loop", "sleep", "call", "lock")
POISON = """
def run(self):
    import os, signal
    how = self.jobdata["how"]
    if how == "exit":
        os._exit(1)
    if how == "segfault":
        import ctypes
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""
STAMP = "def run(self): return time.time() - float(self.jobdata['sent'])"
CONFIG = """
[job hang]
concurrent = 8
[job hung]
executor = process
concurrent = 8
[job poison]
executor = process
concurrent = 2
[job stamp]
concurrent = 2
"""


class Others:
    """Jobs of another type, a few a second, each with its milliseconds from submit to start."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._over = threading.Event()
        self._ids: list[int] = []

    def _go(self) -> None:
        with self._daemon.talk() as talk:
            while not self._over.wait(EVERY_S):
                self._ids.append(int(talk.say(f"stamp sent:{time.time()}").split()[1]))

    @contextmanager
    def going(self) -> Iterator[None]:
        thread = threading.Thread(target=self._go)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def waits_ms(self) -> list[float]:
        return [1000 * self._daemon.wait(id)["result"] for id in self._ids]


def measure(daemon: Daemon, lines: list[str], at_least_s: float) -> tuple[list[float], list[float]]:
    """What the others have waited while these jobs ran; the seconds that each of these took."""
    others = Others(daemon)
    with others.going():
        began_s = time.monotonic()
        ids = [daemon.submit(line) for line in lines]
        took_s = []
        for id in ids:
            daemon.wait(id)
            took_s.append(time.monotonic() - began_s)
        time.sleep(max(at_least_s - (time.monotonic() - began_s), 0))
    return others.waits_ms(), took_s


def main() -> int:
    missed = []

    def judge(name: str, value: str, goal: str, reached: bool) -> None:
        report(name, value, f"goal {goal}{'' if reached else ': MISSED'}")
        if not reached:
            missed.append(name)

    folder = short_folder()
    try:
        with Daemon(folder, CONFIG, hang=HANG, hung=HANG, poison=POISON, stamp=STAMP) as daemon:
            pid = daemon.ask("status")["pid"]
            measure(daemon, [], 2)
            poison = [f"poison how:{how}" for how in ("exit", "segfault", "kill")]
            calm, waits = [], []
            for _ in range(ROUNDS):
                daemon.run("poison how:nothing")  # so that each round begins as the first
                calm.append(percentile(measure(daemon, [], 15)[0], 0.99))
                waits.append(percentile(measure(daemon, poison, 0)[0], 0.99))
                report("others from submit to start, p99", f"{calm[-1]:.1f} ms",
                       f"{waits[-1]:.1f} ms with poison")  # fmt: skip
            jobs = daemon.ask("jobs type:poison state:failed limit:1000")["jobs"]
            starts = {job["starts"] for job in jobs}
            judge("T13 starts of poison jobs, each", str(starts), "{3}", starts == {3})
            crashed = {(job["state"], job["reason"]) for job in jobs}
            judge("T13 their ends", str(crashed), "crashed", crashed == {("failed", "crashed")})
            same = daemon.ask("status")["pid"] == pid
            judge("T13 restarts of the daemon", "0" if same else "1", "0", same)
            p99, before = statistics.median(waits), statistics.median(calm)
            judge("T13 others meanwhile, p99, median", f"{p99:.1f} ms",
                  f"twice {before:.1f} ms", p99 <= 2 * before)  # fmt: skip

            for type, how in [(type, how) for type in ("hung", "hang") for how in HOWS]:
                waits, took_s = measure(daemon, [f"{type} how:{how} @timeout:{TIMEOUT_S}s"], 0)
                over = max(took_s)
                judge(f"T14 {type} {how}: ended or declared after", f"{over:.1f} s",
                      f"{TIMEOUT_S + ON_TOP_S} s", over <= TIMEOUT_S + ON_TOP_S)  # fmt: skip
                late = sum(wait > 1000 for wait in waits)
                judge("    others that started more than 1 s late", str(late), "0", late == 0)
                report("    others, p99", f"{percentile(waits, 0.99):.1f} ms")
            until(lambda: daemon.ask("status")["jobs"]["running"] == 0)
            again = [daemon.run(f"{type} how:nothing")["state"] for type in ("hang", "hung")]
            judge("T14 types that run again", str(again.count("done")), "2", again == ["done"] * 2)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
