"""T17: jobs are cancelled at random while they are queued, start, run and end; then all is counted.

python -m tests.cancels [--jobs N] [--seed N]
python -m tests.cancels --trees N [--seed N]    whole trees, in one daemon and in two
python -m tests.cancels --kills N [--jobs N]    cancels of many that kill -9 cuts off, on all three

Prints a line for each figure with its goal; the exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests import killed_cancels, tree_cancels
from tests.bench import report
from tests.daemons import Daemon, until
from tests.servers import short_folder
from tests.tree_cancels import seconds

#: What a running job may take to end once it was cancelled.
END_S = 6.0

WORK = """
def run(self):
    note("start", self.jobid)
    how, s = self.jobdata["how"], float(self.jobdata["s"])
    over = time.monotonic() + s
    if how == "loop":
        while time.monotonic() < over:
            pass
    elif how == "obeys":
        if self.cancel_event.wait(s):
            return False
    elif how == "fails":
        self.cancel_event.wait(s)
        raise ValueError("as it was told")
    elif how == "sleep":
        time.sleep(s)
"""
CONFIG = """
[job work]
concurrent = 4
retries = 3
retry_delay = 10ms
[job apart]
executor = process
concurrent = 2
retries = 3
retry_delay = 10ms
[job program]
command = sleep {s}
params = s how?
concurrent = 4
"""
FINAL = {"done", "failed", "cancelled", "expired"}


class Cancel(NamedTuple):
    """One cancel and its answer."""

    id: int
    at_s: float
    #: What was answered: the state, or an error.
    said: str


class Figures(NamedTuple):
    jobs: int
    #: Answers by what they said of the job.
    said: Counter[str]
    #: Ids of jobs that did what they must not.
    not_one_end: list[int]
    untrue: list[int]
    started: list[int]
    slowest_s: float


def cancel_all(daemon: Daemon, jobs: int, rng: random.Random) -> Figures:
    """Submit jobs a few at a time and cancel each at some moment of its life."""
    cancels: dict[int, Cancel] = {}
    waiting: list[tuple[float, int]] = []
    ids: list[int] = []
    with daemon.talk() as talk:
        while len(cancels) < jobs:
            while len(waiting) < 12 and len(ids) < jobs:
                type = rng.choice(("work", "work", "apart", "program"))
                how = rng.choice(("loop", "obeys", "fails", "sleep", "nothing"))
                s = rng.choice((0, 0.001, 0.01, 0.05, 0.2))
                if rng.random() < 0.1:
                    s = 1000
                    how = rng.choice(("loop", "obeys", "fails"))
                id = int(talk.say(f"{type} how:{how} s:{s}").split()[1])
                ids.append(id)
                pause_s = rng.choice((0, rng.uniform(0, 0.01), rng.uniform(0, 0.4)))
                waiting.append((time.monotonic() + pause_s, id))
            waiting.sort(reverse=True)
            at_s, id = waiting.pop()
            time.sleep(max(at_s - time.monotonic(), 0))
            asked_s = time.monotonic()
            reply = talk.say(f"cancel {id}")
            said = json.loads(reply[3:])["state"] if reply.startswith("OK ") else reply
            cancels[id] = Cancel(id, asked_s, said)
    for id in ids:
        daemon.wait(id)
    return judge(daemon, cancels)


def judge(daemon: Daemon, cancels: dict[int, Cancel]) -> Figures:
    started = {int(line.split()[1]) for line in daemon.ledger if line.startswith("start ")}
    not_one_end, untrue, wrongly = [], [], []
    slowest_s = 0.0
    said = Counter[str]()
    for id, one in cancels.items():
        told = daemon.ask(f"show {id}")
        state, history = told["job"]["state"], told["history"]
        states = [event["state"] for event in history]
        if sum(s in FINAL for s in states) != 1 or states[-1] != state or state not in FINAL:
            not_one_end.append(id)
        if one.said == "cancelled":
            said["queued: cancelled"] += 1
            if state != "cancelled":
                untrue.append(id)
            if "running" not in states and id in started:
                wrongly.append(id)
        elif one.said == "running":
            said[f"running: {state}"] += 1
            took_s = seconds(told["job"]["ended_at"]) - (time.time() - time.monotonic() + one.at_s)
            slowest_s = max(slowest_s, took_s)
        else:
            said[f"too late: {state}"] += 1
            if one.said != f"ERR wrong_state job {id} is {state} already":
                untrue.append(id)
    return Figures(len(cancels), said, not_one_end, untrue, wrongly, slowest_s)


def run(folder: Path, jobs: int, seed: int) -> Figures:
    with Daemon(folder, CONFIG, work=WORK, apart=WORK) as daemon:
        figures = cancel_all(daemon, jobs, random.Random(seed))
        until(lambda: daemon.ask("status")["jobs"]["running"] == 0)
        return figures


def cancel_trees(trees: int, seed: int, *, shared: bool) -> int:
    folder = short_folder()
    try:
        found = tree_cancels.run(folder, trees, seed, shared=shared)
    finally:
        shutil.rmtree(folder)
    where = "two daemons on PostgreSQL" if shared else "one daemon on SQLite"
    states = dict(sorted(found.states.items()))
    print(f"{where}: {found.trees} trees with {found.jobs} jobs, seed {seed}: {states}")
    report("trees in which something went on", str(len(found.survived)), "goal 0")
    report("starts after the answer", str(len(found.started)), "goal 0")
    report("answers that were not true", str(len(found.untrue)), "goal 0")
    report("trees not done after a retry", str(len(found.unfinished)), "goal 0")
    report("jobs that were done twice", str(len(found.twice)), "goal 0")
    report("longest from cancel to end", f"{found.slowest_s:.2f} s", f"goal {END_S:g} s")
    return int(bool(found.bad) or found.slowest_s > END_S)


def kill_cancels(kills: int, jobs: int) -> int:
    """At so many points on each database; on servers as often with another daemon beside it."""
    missed = 0
    for name in killed_cancels.DATABASES:
        for beside in (False, True)[: 1 if name == "sqlite" else 2]:
            folder = short_folder()
            try:
                found = killed_cancels.run(folder, name, jobs, kills, beside=beside)
            finally:
                shutil.rmtree(folder)
            where = f"{name}{', and another daemon lives' if beside else ''}"
            points = ", ".join(map(str, found.cancelled))
            print(f"{where}: {jobs} jobs, killed when so many were cancelled: {points}")
            report("jobs that survived", str(found.survived), "goal 0")
            report("starts after the restart", str(found.started), "goal 0")
            if beside:
                report("starts in the other until it heard", str(found.unheard), "2 s")
            report("longest to READY", f"{found.ready_s:.2f} s", "")
            report("longest until all was cancelled", f"{found.over_s:.2f} s", "")
            missed |= found.survived or found.started or len(found.cancelled) < kills
    return int(bool(missed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--trees", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    if args.trees:
        return max(cancel_trees(args.trees, args.seed, shared=shared) for shared in (False, True))
    if args.kills:
        return kill_cancels(args.kills, args.jobs or 20_000)
    folder = short_folder()
    try:
        found = run(folder, args.jobs or 1000, args.seed)
    finally:
        shutil.rmtree(folder)
    print(f"{found.jobs} cancels, seed {args.seed}: {dict(sorted(found.said.items()))}")
    report("jobs with no end or with several", str(len(found.not_one_end)), "goal 0")
    report("replies that were not true", str(len(found.untrue)), "goal 0")
    report("starts after a cancel", str(len(found.started)), "goal 0")
    report("longest from cancel to end", f"{found.slowest_s:.2f} s", f"goal {END_S:g} s")
    bad = found.not_one_end + found.untrue + found.started
    return int(bool(bad) or found.slowest_s > END_S)


if __name__ == "__main__":
    sys.exit(main())
