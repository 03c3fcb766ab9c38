"""What chains cost over as many single jobs: medians of rounds that take turns, durable settings.

python -m tests.chain_bench [sqlite|postgres|mariadb] [chains] [rounds]
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

from tests.bench import Daemon, database, fresh, pipelined, report, wait_done

#: What follows in one go, and by `subjobs`.
SINGLES = ("one", "two", "three", "four")
CHAINS = {"chain": "two three", "fork": "(two three) four"}
CONFIG = "".join(f"[job {name}]\nconcurrent = 2\n" for name in SINGLES)
CONFIG += "".join(f"[job {n}]\nconcurrent = 2\nsubjobs = {text}\n" for n, text in CHAINS.items())


def spent(daemon: Daemon, names: Sequence[str], n: int, made: int) -> tuple[float, float]:
    """Seconds by the clock, and of the daemon's CPU, for n of each and all that follows."""
    before, cpu_s, began = daemon.done(), daemon.cpu_s(), time.perf_counter()
    for name in names:
        pipelined(daemon, n, f"{name} fid:50\n".encode())
    wait_done(daemon, before + made)
    return time.perf_counter() - began, daemon.cpu_s() - cpu_s


def compare(daemon: Daemon, name: str, n: int, rounds: int) -> float:
    """Print what n of these cost; returns how many times the time of the single jobs."""
    singles = SINGLES[: len(CHAINS[name].split()) + 1]
    made = n * len(singles)
    rounds_of = [
        (spent(daemon, singles, n, made), spent(daemon, [name], n, made)) for _ in range(rounds)
    ]
    for at, what in enumerate(("time", "CPU time")):
        alone_s = statistics.median(single[at] for single, _ in rounds_of)
        together_s = statistics.median(chained[at] for _, chained in rounds_of)
        more = statistics.median(chained[at] / single[at] for single, chained in rounds_of) - 1
        report(f"{n} of {name} against {made} single jobs, {what}",
               f"{together_s:.2f} / {alone_s:.2f} s", f"{more:+.0%}, goal +20 %")  # fmt: skip
    return statistics.median(chained[0] / single[0] for single, chained in rounds_of)


@contextlib.contextmanager
def started(url: str) -> Iterator[Daemon]:
    """A daemon that has run some of each kind."""
    with fresh(url, more=CONFIG) as daemon:
        for name in (*SINGLES, *CHAINS):
            text = (daemon.folder / "jobs/noop.py").read_text()
            (daemon.folder / f"jobs/{name}.py").write_text(text.replace("Noop", name.capitalize()))
        daemon.start()
        spent(daemon, [*SINGLES, *CHAINS], 100, 1100)
        yield daemon


def main() -> None:
    kind, n, rounds = (*sys.argv[1:], *("sqlite", "3000", "7")[len(sys.argv) - 1 :])
    with database(kind) as url, started(url) as daemon:
        for name in CHAINS:
            compare(daemon, name, int(n), int(rounds))


if __name__ == "__main__":
    main()
