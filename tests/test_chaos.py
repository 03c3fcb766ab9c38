"""Nothing is lost: the trials of `tests.chaos` in small; the audit itself is held to account."""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from tests import chaos
from tests.chaos import Facts, Mark, Row, Step, Store, Trial, Try
from tests.conftest import unavailable
from tests.daemons import until
from tests.servers import MariaDB, Postgres, PrivateServer
from upq import schema, writer
from upq.batch import Act, Batch
from upq.db import Database
from upq.errors import KeyConflict, Unavailable, Uncertain
from upq.events import Bus
from upq.job import DONE, FAILED, QUEUED, RUNNING, Accepted, Job, NewJob, Outcome
from upq.plugins import UpqJob
from upq.pool import Pool
from upq.queue import Queue
from upq.runner import Runner

T = TypeVar("T")

# The audit ----------------------------------------------------------------------------------------


#: A death of the daemon, in the time of trouble.
DIED = Step(12, 100_500_000, QUEUED, "interrupted")


def story() -> Facts:
    """All is well: a job that met a kill, a chain, a parent with children, two notifications."""
    facts = Facts({}, [], {(1, DONE): 12}, {(1, DONE): 12}, troubles=[(100.0, 101.0)])

    def runs(id: int, type: str, parent: int | None, kills: int = 0) -> None:
        params: dict[str, Any] = {"n": id, "job": {"jobid": parent}}
        above = None if type == "notify" else parent
        facts.rows[id] = Row(id, type, DONE, "", 1 + kills, kills, -id, above, json.dumps(params))
        facts.steps.append(Step(id, 99_000_000, QUEUED, ""))
        for token in range(id + 100, id + 100 + kills):
            facts.steps += [Step(id, 99_500_000, RUNNING, ""), DIED._replace(job=id)]
            facts.marks.append(Mark("start", id, token, 1, 1.0))
        facts.steps += [Step(id, 101_000_000, RUNNING, ""), Step(id, 102_000_000, DONE, "")]
        facts.marks += [Mark("start", id, id, 2, 3.0), Mark("end", id, id, 2, 4.0)]

    runs(1, "ledger", None, kills=1)
    runs(2, "first", None)
    runs(3, "second", 2)
    runs(4, "third", 3)
    runs(5, "notify", 4)
    for id in 7, 8, 9:
        runs(id, "child", 6)
    runs(6, "family", None)
    runs(10, "last", 6)
    runs(11, "notify", 10)
    runs(12, "ledger", None)
    facts.told = {4: 1, 10: 2}
    facts.tries = [Try(n, b"", n == 1, ids=[n]) for n in (1, 2, 6, 12)]
    return facts


def test_the_audit_is_content_with_a_good_story() -> None:
    assert chaos.Audit(story()).text == ""


def steps_of(facts: Facts, id: int, *steps: Step) -> None:
    facts.steps = [step for step in facts.steps if step.job != id] + list(steps)


def change(facts: Facts, id: int, **fields: Any) -> None:
    facts.rows[id] = facts.rows[id]._replace(**fields)


def crash(facts: Facts, times: int) -> None:
    """Job 12 is failed as crashed, after so many deaths of the daemon."""
    change(facts, 12, state=FAILED, reason="crashed", crashes=3, starts=times)
    steps = [Step(12, 99, QUEUED, ""), *[Step(12, 99, RUNNING, ""), DIED] * times]
    steps_of(facts, 12, *steps[:-1], DIED._replace(state=FAILED, reason="crashed"))


#: What goes wrong in the story, by the rule that must see it.
WRONGS: dict[str, Callable[[Facts], Any]] = {
    "ACKed jobs lost": lambda f: f.rows.pop(12),
    "jobs that did not end": lambda f: change(f, 12, state=RUNNING),
    "refused submits that were queued": lambda f: f.tries.__setitem__(
        3, Try(12, b"", False, refusals=["unavailable the database is away"])
    ),
    "refusals for an unknown reason": lambda f: f.tries[3].refusals.append("internal a fault"),
    "submits that became several jobs": lambda f: change(f, 12, params='{"n":"1"}'),
    "keys with several ids": lambda f: f.tries[0].ids.append(12),
    "unexplained starts": lambda f: f.troubles.clear(),
    "changes after the end": lambda f: f.steps.append(Step(12, 103_000_000, RUNNING, "")),
    "impossible changes of state": lambda f: steps_of(
        f, 12, Step(12, 1, RUNNING, ""), Step(12, 2, DONE, "")
    ),
    "starts unlike the history": lambda f: change(f, 12, starts=2),
    "claims that ran twice": lambda f: f.marks.append(Mark("start", 12, 12, 2, 5.0)),
    "runs of what was given back": lambda f: f.marks.append(Mark("start", 12, 77, 2, 5.0)),
    "done without having run to its end": lambda f: f.marks.remove(Mark("end", 12, 12, 2, 4.0)),
    "failed without three crashes": lambda f: crash(f, 2),
    "failed and never begun": lambda f: (crash(f, 3), f.marks.clear()),
    "missing or doubled successors": lambda f: f.rows.pop(10),
    "parents that ended before a child": lambda f: f.steps.append(f.steps.pop(f.steps.index(
        Step(9, 102_000_000, DONE, "")))),
    "missing notifications": lambda f: f.told.pop(4),  # type: ignore[attr-defined]
    "counts unlike the table": lambda f: f.tally.update({(1, DONE): 11}),
}  # fmt: skip


@pytest.mark.parametrize("rule", chaos.Audit.RULES)
def test_the_audit_sees(rule: str) -> None:
    facts = story()
    WRONGS[rule](facts)
    assert rule in chaos.Audit(facts).found


def test_the_audit_accepts_a_job_that_three_kills_have_met() -> None:
    facts = story()
    crash(facts, 3)
    assert chaos.Audit(facts).text == ""


# Trials -------------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_kill_9_loses_nothing(url: str, short_tmp: Path) -> None:
    kills = 25 if url.startswith("sqlite") else 10
    with Trial(Store(short_tmp, url)) as trial:
        chaos.kill_daemon(trial, kills, (0.02, 0.4))
        facts = trial.settle()
    assert chaos.Audit(facts).text == ""
    assert facts.acked > 10 * kills
    assert sum(step.reason == "interrupted" for step in facts.steps) >= kills
    # Without the worst, which a stall may have met: `python -m tests.chaos` holds it to the goals.
    plain, *again = (life.took_s for life in facts.lives)
    assert sorted(again)[-2] <= max(2, 3 * plain)
    first = chaos.first_starts(facts)
    assert len(first) >= kills // 2
    assert sorted(first)[-2] <= 1


def survive(store: Store, *hurts: Callable[[Trial], float]) -> None:
    """One daemon meets all that, loses nothing and is back within 5 s each time."""
    with Trial(store, clients=8) as trial:
        for hurt in hurts:
            assert hurt(trial) <= 5
        assert trial.daemon.is_alive
        facts = trial.settle()
    assert chaos.Audit(facts).text == ""
    assert trial.load.slowest_s <= chaos.REPLY_S
    assert any(one.refusals or one.doubts for one in facts.tries)


def survive_both(
    servers: Sequence[PrivateServer], folder: Path, *hurts: Callable[[Trial], float]
) -> None:
    """On these servers at the same time."""

    def run(server: PrivateServer) -> None:
        place = folder / type(server).__name__
        place.mkdir()
        with server.database() as url:
            survive(Store(place, url, server), *hurts)

    with ThreadPoolExecutor() as pool:
        for ended in [pool.submit(run, server) for server in servers]:
            ended.result()


@pytest.mark.alone
def test_a_database_that_crashes_loses_nothing(
    postgres: Postgres, mariadb: MariaDB, short_tmp: Path
) -> None:
    crash = partial(chaos.crash_server, life_s=(0.5, 1.5))
    survive_both([postgres, mariadb], short_tmp, *[crash] * 5)


@pytest.mark.alone
def test_a_database_that_hangs_is_given_up_in_time(
    postgres: Postgres, mariadb: MariaDB, short_tmp: Path
) -> None:
    survive_both([postgres, mariadb], short_tmp, chaos.hang_server)


@pytest.mark.alone
def test_a_read_only_database_is_refused_and_survived(postgres: Postgres, short_tmp: Path) -> None:
    with postgres.database() as url:
        survive(Store(short_tmp, url, postgres), chaos.forbid_writing)


@pytest.mark.alone
def test_a_full_disk_is_refused_and_survived() -> None:
    try:
        with chaos.new_store("disk") as store:
            survive(store, chaos.fill_disk)
    except chaos.CannotMount as error:
        unavailable(str(error))


def need_strace() -> None:
    if not shutil.which("strace"):
        unavailable("no program strace")


@pytest.mark.alone
def test_a_disk_that_fails_is_refused_and_survived(short_tmp: Path) -> None:
    need_strace()
    store = Store(short_tmp, f"sqlite:///{short_tmp}/upq.db")
    survive(store, chaos.forbid_disk, chaos.break_fsync)


def test_a_job_whose_commit_failed_and_is_there_all_the_same_starts(short_tmp: Path) -> None:
    # SQLite reads the log anew when all its connections were closed, and finds what it had refused.
    need_strace()
    file = short_tmp / "upq.db"
    with chaos.Victim(short_tmp, f"sqlite:///{file}") as daemon:
        daemon.forgiven = chaos.AWAY
        daemon.submit("ledger n:1")
        until(lambda: "finished: done" in daemon.log)
        with chaos.failing(daemon.pid, "fdatasync,fsync", "EIO", file):
            assert daemon.say("ledger n:2 @in:1s").startswith("ERR uncertain ")
        until(lambda: daemon.say("child n:3").startswith("ACK "))
        daemon.drain(10)
    found = {row.n: row.state for row in chaos.read_facts(daemon.url).rows.values()}
    assert found == {1: DONE, 2: DONE, 3: DONE}


class Quick(Runner):
    """Runs nothing, at once."""

    def __init__(self) -> None:
        pass

    def run(self, job: Job, begun: Callable[[UpqJob], None]) -> None:
        pass


def test_nothing_is_claimed_ahead_beside_a_job_that_met_the_death_of_a_daemon() -> None:
    # Else it could be failed as crashed after three deaths, and never have begun.
    pool = Pool("a", 4, Quick(), lambda: None)
    job = Job._make([None] * len(Job._fields))._replace(type="a", id=0, crashes=0)

    def run(*jobs: Job) -> int:
        """The room that is booked after these jobs have run."""
        pool.give(0, jobs)
        until(lambda: not pool.has_claimed() and not pool.running())
        room = pool.book()
        pool.give(room, [])
        return room

    assert run(*[job._replace(id=n, token=n) for n in range(1, 101)]) > 4
    assert run(job._replace(id=101, token=101, crashes=1)) == 4
    assert run(job._replace(id=102, token=102)) > 4


# Keys ---------------------------------------------------------------------------------------------


def test_a_key_that_many_ask_for_at_once_is_one_job(url: str, short_tmp: Path) -> None:
    with chaos.Victim(short_tmp, url) as daemon:
        ids = chaos.race_for_keys(daemon)
        daemon.restart()
        assert chaos.race_for_keys(daemon) == ids
        assert daemon.say("ledger n:other @key:race1").startswith("ERR key_conflict ")
        daemon.drain(30)
    assert all(len(one) == 1 for one in ids.values())
    assert chaos.read_facts(url).rows.keys() == set().union(*ids.values())


# Neighbours in a batch ----------------------------------------------------------------------------


class Together:
    """Changes that are made to share one transaction: they gather while another one is held up."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._go_on = threading.Event()
        self._pool = ThreadPoolExecutor()
        self._running: list[Future[Any]] = []
        held = threading.Event()

        def hold(batch: Batch) -> None:
            held.set()
            self._go_on.wait()

        self._pool.submit(queue.writer.run, [Act(hold)])
        assert held.wait(10)

    def add(self, call: Callable[[], Any]) -> Future[Any]:
        """What the call will return; its changes stand behind those that were added before."""
        before = self._queue.writer.pending
        self._running.append(self._pool.submit(call))
        until(lambda: self._queue.writer.pending > before)
        return self._running[-1]

    def go(self) -> None:
        self._go_on.set()
        self._pool.shutdown()


def open_queue(url: str) -> Queue:
    database = Database(url)
    database.prepare()
    made = Queue(database, Bus(), "node")
    made.open()
    made.lane("a", "a")
    made.reserve_ids(1)
    return made


def shut(queue: Queue) -> None:
    queue.writer.close()
    queue.database.close()


def test_a_bad_change_never_fails_its_neighbours(url: str) -> None:
    queue = open_queue(url)
    keyed = submit(queue, new("k"))
    job = claim(queue)
    told: dict[str, bool] = {}
    together = Together(queue)
    good = together.add(lambda: queue.submit([[new()]]))
    queue.finish(job._replace(token=7), Outcome(FAILED), [], lambda ours: told.update(lost=ours))
    queue.finish(job, Outcome(DONE), [new()], lambda ours: told.update(own=ours))
    conflict = together.add(lambda: queue.submit([[NewJob("a", {}, key="k")]]))
    broken = together.add(lambda: queue.writer.run([Act(twice)]))
    repeat = together.add(lambda: queue.submit([[new("k")], [new()]]))
    together.go()
    assert told == {"lost": False, "own": True}
    assert isinstance(conflict.result()[0], KeyConflict)
    assert isinstance(broken.result()[0], Unavailable)
    assert repeat.result()[0] == [(keyed.id, True)]
    assert not isinstance(good.result()[0], Exception)
    assert states(queue) == [("a", DONE), *[("a", QUEUED)] * 3]
    shut(queue)


def twice(batch: Batch) -> None:
    batch.tx.cursor.execute("INSERT INTO upq_counter (name, n) VALUES ('job', 0)")


# The commit in doubt ------------------------------------------------------------------------------


class Proxy:
    """Between upq and a database server; cuts the connection at a COMMIT.

    Which: the one of the transaction in which `mark` was sent. How: "before" it reaches the server,
    "after" the server has done it, or "late": it reaches the server when the test says `let_go`.
    Or at once when `mark` is sent: "early".
    """

    def __init__(self, folder: Path, server: PrivateServer, url: str) -> None:
        name = ".s.PGSQL.5432" if isinstance(server, Postgres) else "socket"
        where = str(folder if isinstance(server, Postgres) else folder / name)
        key = "host" if isinstance(server, Postgres) else "unix_socket"
        self.url = sa.make_url(url).update_query_dict({key: where}).render_as_string(False)
        self.cut = ""
        self.mark = b"cut"
        self._let_go = threading.Event()
        self._arrived = threading.Event()
        self._back = str(server.folder / name)
        self._front = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._front.bind(str(folder / name))
        self._front.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def let_go(self) -> None:
        """Let the server have the late COMMIT, and wait until it has done it."""
        self._let_go.set()
        assert self._arrived.wait(10)

    def close(self) -> None:
        self._front.shutdown(socket.SHUT_RDWR)
        self._front.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._front.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        seen = b""
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(OSError), client, server:
            server.connect(self._back)
            while True:
                ready, _, _ = select.select([client, server], [], [])
                if server in ready:
                    data = server.recv(1 << 16)
                    client.sendall(data)
                else:
                    data = client.recv(1 << 16)
                    seen += data
                    is_time = b"COMMIT" in data or self.cut == "early"
                    if self.cut and self.mark in seen and is_time:
                        self._end(client, server, data)
                        return
                    seen = b"" if b"COMMIT" in data else seen
                    server.sendall(data)
                if not data:
                    return

    def _end(self, client: socket.socket, server: socket.socket, data: bytes) -> None:
        how, self.cut = self.cut, ""
        if how == "late":
            client.close()
            self._let_go.wait(60)
        if how in ("after", "late"):
            server.sendall(data)
            server.recv(1 << 16)
            self._arrived.set()


@pytest.fixture(params=["postgres", "mariadb"])
def proxy(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[Proxy]:
    server: PrivateServer = request.getfixturevalue(request.param)
    with server.database() as url:
        made = Proxy(short_tmp, server, url)
        yield made
        made.close()


@pytest.fixture
def queue(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    monkeypatch.setattr(writer, "PROBE_S", 0.05)
    made = open_queue(proxy.url)
    yield made
    shut(made)


def new(key: str = "", type: str = "a") -> NewJob:
    return NewJob(type, {"word": "cut"}, key=key)


def submit(queue: Queue, job: NewJob) -> Accepted:
    (stored,) = soon(lambda: queue.submit([[job]]))
    assert isinstance(stored, list)
    return stored[0]


def claim(queue: Queue) -> Job:
    # A server that has not seen yet that a connection is cut keeps the job locked.
    (job,) = until(lambda: soon(lambda: queue.claim([(queue.lane("a", "a").id, 1)])))
    return job


def soon(call: Callable[[], T]) -> T:
    """What a call returns once the database is there again."""
    while True:
        try:
            return call()
        except Unavailable:
            time.sleep(0.05)


def states(queue: Queue) -> list[tuple[str, str]]:
    with queue.database.read() as connection:
        query = sa.select(schema.job.c.type, schema.job.c.state).order_by(schema.job.c.id)
        return [tuple(row) for row in connection.execute(query)]


@pytest.mark.parametrize("how", ["before", "late"])
def test_a_commit_in_doubt_is_never_acknowledged(queue: Queue, proxy: Proxy, how: str) -> None:
    proxy.cut = how
    with pytest.raises(Uncertain):
        submit(queue, new("k"))
    if how == "late":
        proxy.let_go()
    again = submit(queue, new("k"))
    assert again.duplicate == (how == "late")
    assert states(queue) == [("a", "queued")]
    assert submit(queue, new("k")) == (again.id, True)


def test_a_commit_that_is_found_on_a_new_connection_is_acknowledged(
    queue: Queue, proxy: Proxy
) -> None:
    proxy.cut = "after"
    first = submit(queue, new("k"))
    assert not first.duplicate
    assert submit(queue, new("k")) == (first.id, True)
    assert states(queue) == [("a", "queued")]


def test_a_repeat_that_overtakes_its_first_commit_finds_its_job(queue: Queue, proxy: Proxy) -> None:
    proxy.cut = "late"
    with pytest.raises(Uncertain):
        submit(queue, new("k"))
    late = threading.Timer(0.5, proxy.let_go)
    late.start()
    assert submit(queue, new("k")).duplicate
    late.join()
    assert states(queue) == [("a", "queued")]


@pytest.mark.parametrize("how", ["before", "after", "late"])
def test_an_end_whose_commit_is_in_doubt_is_stored_once(
    queue: Queue, proxy: Proxy, how: str
) -> None:
    submit(queue, new())
    job = claim(queue)
    proxy.cut = how
    told: list[bool] = []
    queue.finish(job, Outcome(DONE, "cut"), [new(type="b")], told.append)
    late = threading.Timer(0.5, proxy.let_go)
    if how == "late":
        late.start()

    def commit() -> bool:
        with contextlib.suppress(Uncertain, Unavailable):
            queue.claim([])
        return not queue.writer.pending

    until(commit)
    assert told == [True]
    assert states(queue) == [("a", DONE), ("b", "queued")]


@pytest.mark.parametrize("how", ["before", "after", "late"])
def test_a_claim_whose_commit_is_in_doubt_is_found_again(
    queue: Queue, proxy: Proxy, how: str
) -> None:
    id = submit(queue, new()).id
    proxy.mark, proxy.cut = queue.owner.encode(), how
    if how == "after":
        assert claim(queue).id == id
    else:
        with pytest.raises(Uncertain):
            claim(queue)
    if how == "late":
        proxy.let_go()
    strays = soon(queue.release_strays)
    assert len(strays) == (how == "late")
    if how != "after":
        assert claim(queue).id == id
    assert states(queue) == [("a", RUNNING)]


def test_what_was_stored_before_the_database_went_away_is_acknowledged(
    queue: Queue, proxy: Proxy
) -> None:
    submit(queue, new())
    job = claim(queue)
    together = Together(queue)
    first = together.add(lambda: queue.submit([[NewJob("a", {})]]))
    queue.finish(job._replace(token=7), Outcome(FAILED))  # breaks the batch up
    last = together.add(lambda: queue.submit([[new()]]))
    proxy.mark, proxy.cut = b"cut", "early"
    together.go()
    assert [type(one) for one in first.result()] == [list]
    assert [type(one) for one in last.result()] == [Unavailable]
    assert states(queue) == [("a", RUNNING), ("a", QUEUED)]


@pytest.mark.parametrize("proxy", ["postgres"], indirect=True)
def test_a_job_whose_claim_is_committed_late_does_not_stay_running(
    proxy: Proxy, tmp_path: Path, short_tmp: Path
) -> None:
    folder = short_tmp / "d"
    folder.mkdir()
    with chaos.Victim(folder, proxy.url) as daemon:
        daemon.forgiven = chaos.AWAY
        proxy.cut = "late"
        assert daemon.say("ledger n:1 word:cut").startswith("ERR uncertain ")
        until(lambda: daemon.ask("status")["state"] == "running")
        for _ in range(3):
            commits = daemon.ask("status")["counters"]["commits"]
            daemon.ask("resume ledger")  # wakes the claimer, which looks for what it has lost
            until(lambda n=commits: daemon.ask("status")["counters"]["commits"] > n + 1)
        proxy.let_go()
        daemon.drain(20)
        assert [row.state for row in chaos.read_facts(daemon.url).rows.values()] == [DONE]


@pytest.mark.parametrize("proxy", ["postgres"], indirect=True)
def test_a_claim_of_a_dead_daemon_that_is_committed_late_does_not_stay_running(
    proxy: Proxy, short_tmp: Path
) -> None:
    with chaos.Victim(short_tmp, proxy.url) as daemon:
        daemon.forgiven = chaos.AWAY
        proxy.cut = "late"
        assert daemon.say("ledger n:1 word:cut").startswith("ERR uncertain ")
        daemon.restart()
        proxy.let_go()
        daemon.drain(30)
        assert [row.state for row in chaos.read_facts(daemon.url).rows.values()] == [DONE]
