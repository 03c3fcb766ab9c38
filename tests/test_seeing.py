"""What can be seen of jobs and done to many of them, through a real daemon: parameters, secrets,
progress, output, attempts, `why`, `cancel` and `retry` of a kind.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.conftest import note_database
from tests.daemons import ROOT, Daemon, acting_as, until
from tests.servers import short_folder
from tests.test_trip import url_of
from upq import schema, vault, when

JOBS = {
    "hash": """
fid: int
path: Path | None = None
mode: Literal["fast", "full"] = "fast"

def check(self):
    self.seen = (self.fid, self.path, self.mode)

def run(self):
    self.result = [self.jobdata, [str(one) for one in self.seen]]
""",
    "mixed": """
fid: int

def run(self):
    self.result = self.jobdata
""",
    "chained": "def run(self): pass",
    "parent": """
def run(self):
    try:
        self.submit("hash", **self.jobdata)
    except Exception as error:
        self.msg(f"{type(error).__name__}: {error}")
        return False
""",
    "slow": """
def run(self):
    self.progress(4, 10, "copying")
    self.output.write("one\\n")
    gate("go", lambda: self.cancelled)
    self.output.write("two\\n")
    self.progress(10, 10, "copied")
    return not self.cancelled
""",
    "fails": """
def run(self):
    note("start", self.jobid, self.retries)
    self.output.write("x" * self.retries)
    self.jobdata["n"] = self.jobdata.get("n", 0) + 1
    self.msg(f"no {self.jobdata['n']}")
    return self.jobdata["n"] > int(self.jobdata.get("times", 99))
""",
    "weary": """
def run(self):
    self.msg("not today")
    return False
""",
    "busy": """
def run(self):
    gate("go", lambda: self.cancelled)
    return not self.cancelled
""",
    "bulk": """
def run(self):
    gate("go", lambda: self.cancelled)
    return not self.cancelled
""",
    "leaky": """
def check(self):
    if "refuse" in self.jobdata:
        raise ValueError(f"cannot use {self.jobdata['password']!r}")
    self.msg(f"taken with {self.jobdata['password']}")

def run(self):
    import threading
    word, api = self.jobdata["password"], self.getcfg("api_token")
    self.logger.info("logging in with %s at %s", word, api)
    self.output.write(f"login {word}")
    for letter in f" and {word} {api}\\n":
        self.output.write(letter)
    self.progress(1, 2, f"using {word}")
    self.jobdata["url"] = f"http://me:{word}@host/"
    self.result = {"password": word, "said": f"{word}!", "deep": [{"password": word}]}
    helper = threading.Thread(target=self.help)
    helper.start()
    helper.join()
    gate("go", lambda: "wait" not in self.jobdata)
    if "fail" in self.jobdata:
        raise ValueError(f"bad {word}, bad {api}")
    self.msg(f"done with {word} and {api}")

def help(self):
    raise RuntimeError(f"helper has {self.jobdata['password']}")
""",
}
CONFIG = """
[logging]
loglevel = debug
[access]
read = *
submit = *
[mail]
server = 127.0.0.1:1
user = upq
password = {mail}
from = upq@example.org
[job hash]
subjobs =
[job mixed]
params = fid:int=7 level:choice(a,b)=a
[job chained]
subjobs = hash
[job parent]
[job slow]
[job fails]
retries = 2
retry_delay = 50ms
retry_backoff = 1
[job weary]
retries = 1
retry_delay = 1h
[job busy]
concurrent = 2
[job bulk]
concurrent = 2
[job other]
command = true
[job leaky]
secret = password
api_token = {api}
notify_fail = mail:a@example.org
notify_success = mail:a@example.org
retries = 0
[job seen]
params = user password
secret = password
command = sh -c 'cat /proc/self/environ; echo' sh {user}
[job broken]
command = true
params = a:int
[job notify]
"""

#: What must be found nowhere.
CANARIES = {name: f"canary-{name}-{os.urandom(4).hex()}" for name in
            ("param", "mail", "api", "chain", "db")}  # fmt: skip


@pytest.fixture(scope="module", params=["sqlite", "mariadb", "postgres"])
def shared(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    folder = short_folder()
    with contextlib.contextmanager(url_of)(request.param, folder, request) as url:
        config = CONFIG.format(**{**CANARIES, "user": "{user}"})
        vault.add_key(str(folder / "keys"))
        config += f"[db]\nkey_file = {folder}/keys\n"
        daemon = Daemon(folder, config, url, **JOBS)
        for name in "hash", "mixed":
            file = folder / f"jobs/{name}.py"
            file.write_text("from typing import Literal\n" + file.read_text())
        shutil.copy(Path(__file__).parents[1] / "jobs/notify.py", folder / "jobs")
        daemon.env["UPQ_SECRET_OF_THE_DAEMON"] = CANARIES["db"]
        with daemon:
            yield daemon
    shutil.rmtree(folder)


@pytest.fixture
def daemon(shared: Daemon, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    note_database(request, shared.ask("status")["database"])
    for leftover in ("ledger", "go"):
        (shared.folder / leftover).unlink(missing_ok=True)
    yield shared
    shared.open_gate("go")

    def is_idle() -> bool:
        shared.ask("cancel type:notify")
        return not any(q["queued"] + q["running"] for q in shared.ask("queues")["queues"])

    until(is_idle)


def cli(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "upq-cli"), "-s", str(daemon.folder / "s"), *words],
        env=daemon.environment(), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


# Parameters ------------------------------------------------------------------------------------


def test_a_class_says_what_it_takes(daemon: Daemon) -> None:
    done = daemon.run("hash fid:50 path:/a/b")
    assert done["params"] == {"fid": 50, "path": "/a/b", "mode": "fast"}
    assert done["result"] == [done["params"], ["50", "/a/b", "fast"]]
    assert daemon.run('hash {"fid": 5}')["result"][1] == ["5", "None", "fast"]
    for line, fault in (
        ("hash", "fid: is missing"),
        ("hash fid:x", "fid: 'x' is not a whole number"),
        ("hash fid:1 mode:slow", "mode: 'slow' is not one of fast, full"),
        ("hash fid:1 path:here", "path: 'here' is not an absolute path"),
        ("hash fid:1 pat:/x", "unknown parameter 'pat' (did you mean path?)"),
    ):
        assert daemon.say(line) == f"ERR bad_params {fault}"
        assert daemon.say(f"check {line}") == f"ERR bad_params {fault}"


def test_the_ini_wins_over_the_class(daemon: Daemon) -> None:
    assert daemon.run("mixed")["result"] == {"fid": 7, "level": "a"}
    assert daemon.say("mixed level:c") == "ERR bad_params level: 'c' is not one of a, b"


def test_help_and_check_show_what_a_type_takes(daemon: Daemon) -> None:
    declared = "fid:int path:path? mode:choice(fast,full)=fast"
    assert daemon.ask("help")["types"]["hash"] == {
        "params": ["fid", "path", "mode"],
        "declared": declared,
    }
    assert daemon.ask("check hash fid:1")["declared"] == declared
    assert daemon.ask("check mixed")["declared"] == "fid:int=7 level:choice(a,b)=a"


def test_children_and_followers_are_checked_by_the_same(daemon: Daemon) -> None:
    bad = daemon.run("parent fid:x")
    assert bad["message"] == "BadParams: fid: 'x' is not a whole number"
    good = daemon.run("parent fid:3")
    (child,) = daemon.ask(f"show {good['id']}")["children"]
    assert daemon.wait(child["id"])["params"] == {"fid": 3, "mode": "fast"}
    for fid, state in (("4", "done"), ("x", "failed")):
        first = daemon.run(f"chained fid:{fid}")["id"]
        (next_,) = daemon.ask(f"show {first}")["children"]
        ended = daemon.wait(next_["id"])
        assert ended["state"] == state, ended
    assert ended["message"] == "fid: 'x' is not a whole number"


# Secrets ---------------------------------------------------------------------------------------


def test_canaries_are_found_nowhere(daemon: Daemon) -> None:
    word = CANARIES["param"]
    assert word not in daemon.say(f"leaky password:{word} refuse")
    ids = [
        daemon.submit(f"leaky password:{word} more:1"),
        daemon.submit(f"leaky password:{word} fail"),
        daemon.submit(f"leaky password:{word} wait"),
        daemon.submit(f"seen user:me password:{word}"),
    ]
    for id in ids[:2] + ids[3:]:
        daemon.wait(id)
    until(lambda: "and *** ***" in daemon.say(f"output {ids[2]}"))
    said = [
        daemon.say(line)
        for line in (
            *(f"{verb} {id}" for verb in ("show", "output", "why", "wait", "retry")
              for id in ids if verb != "wait" or id != ids[2]),
            *("jobs", "jobs type:notify", "jobs state:failed", "queues", "status", "help", "nodes"),
            f"check leaky password:{word}", f"check seen user:a password:{word} pasword:{word}",
            f'leaky password:"{word}', f'leaky {{"a": 1}}password:{word}',
            f'leaky password:"{word}"x', f'{{"submit": "leaky", "params": {{"password": "{word}"',
            f"output {ids[2]} from:{6}", f"output {ids[2]} from:14",
            f"cancel {ids[2]}", f"show {ids[2]}", "reload", "ping", "version",
        )
    ]  # fmt: skip
    shown = [cli(daemon, *words) for words in (("show", str(ids[0])), ("jobs",))]
    said += [done.stdout + done.stderr for done in shown]
    said += [daemon.log, (daemon.folder / "stderr").read_text()]
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if proc.joinpath("cmdline").read_bytes() != Path("/proc/self/cmdline").read_bytes():
                said.append(proc.joinpath("cmdline").read_bytes().decode("utf-8", "replace"))
    hits = [(name, text[:300]) for name, canary in CANARIES.items() for text in said
            if canary in text]  # fmt: skip
    assert hits == []
    assert "Traceback" in daemon.log and "helper has ***" in daemon.log
    half = word[len(word) // 2 :]
    assert not [text[:300] for text in said if half in text], "not even a half of it"
    print(f"canaries {len(CANARIES)}, texts {len(said)}, hits {len(hits)}")


def stored(daemon: Daemon) -> str:
    """All that the database holds of jobs, as text."""
    engine = sa.create_engine(daemon.url or f"sqlite:///{daemon.folder}/state/upq.db")
    texts = []
    with engine.connect() as connection:
        for table in schema.meta.sorted_tables:
            texts += [str(tuple(row)) for row in connection.execute(sa.select(table))]
    engine.dispose()
    return "\n".join(texts)


def test_secrets_are_encrypted_in_the_database_and_whole_for_the_job(daemon: Daemon) -> None:
    word = CANARIES["chain"]
    daemon.run(f"leaky password:{word} more:1 @key:secret")
    daemon.wait(daemon.submit(f"leaky password:{word} fail"))
    assert word not in stored(daemon)
    first = daemon.say(f"leaky password:{word} more:1 @key:secret")
    assert re.fullmatch(r"ACK \d+ duplicate", first), "compared as it was submitted"
    assert daemon.say(f"leaky password:{word}x more:1 @key:secret").startswith("ERR key_conflict")


@pytest.fixture
def own(url: str, short_tmp: Path) -> Daemon:
    body = """
def run(self):
    note("ran", self.jobid, self.jobdata["password"])
    self.result = {"password": self.jobdata["password"] + "!"}
"""
    keys = "[db]\nkey_file = keys\n[job login]\nsecret = password\n"
    return Daemon(short_tmp, keys, "" if url.startswith("sqlite") else url, login=body)


def test_keys_are_rotated_and_a_missing_one_blocks_and_loses_nothing(own: Daemon) -> None:
    with_keys = own.config.read_text()
    keys = own.folder / "keys"
    vault.add_key(str(keys))
    first_key = keys.read_text()
    own.config.write_text(with_keys.replace("key_file = keys", ""))
    with own:
        plain = own.submit("login password:plain-word @in:1h")
        own.end()
        own.config.write_text(with_keys)
        own.start()
        one = own.submit("login password:first-word @in:1h")
        vault.add_key(str(keys))
        own.ask("reload")
        two = own.submit("login password:second-word @in:1h")
        text = stored(own)
        assert "plain-word" in text and "first-word" not in text and "second-word" not in text
        own.end()
        # The first key is lost: jobs that it has encrypted wait, all others run.
        keys.write_text(keys.read_text().replace(first_key, ""))
        own.start()
        for id in (plain, one, two):
            own.ask(f"cancel {id}")
            own.ask(f"retry {id}")
        assert {own.wait(id)["state"] for id in (plain, two)} == {"done"}
        until(lambda: own.job(one)["state"] == "blocked")
        assert "is not in [db] key_file" in own.why(one)
        assert own.job(one)["params"] == {"password": "***"}
        assert own.job(one)["attempt"] == 0
        own.end()
        # It is found again.
        keys.write_text(keys.read_text() + first_key)
        own.start()
        own.ask(f"cancel {one}")
        own.ask(f"retry {one}")
        assert own.wait(one)["state"] == "done"
        assert own.ledger == [f"ran {plain} plain-word", f"ran {two} second-word",
                              f"ran {one} first-word"]  # fmt: skip
        assert own.job(one)["result"] == {"password": "***"}
        own.end()


def test_a_key_file_is_made_added_to_and_looked_after(tmp_path: Path) -> None:
    file = tmp_path / "keys"

    def upq(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "upq", *args], cwd=Path(__file__).parents[1],
                              capture_output=True, text=True, check=False, timeout=60)  # fmt: skip

    def fault() -> str:
        (tmp_path / "upq.cfg").write_text(f"[db]\nkey_file = {file}\n")
        done = upq("--check", "-c", str(tmp_path / "upq.cfg"))
        assert done.returncode == (78 if done.stderr else 0)
        return done.stderr.replace(str(tmp_path), "")

    assert fault() == "upq: /upq.cfg:2: key_file: /keys: No such file or directory\n"
    assert upq("--new-key", str(file)).returncode == 0
    assert file.stat().st_mode & 0o777 == 0o600
    first = file.read_text()
    assert upq("--new-key", str(file)).returncode == 0
    assert file.read_text().endswith(first) and len(file.read_text()) == 2 * len(first)
    assert fault() == ""
    file.chmod(0o644)
    assert "others can read or write it" in fault()
    file.chmod(0o600)
    file.write_text("no key\n" + first)
    assert fault() == "upq: /upq.cfg:2: key_file: /keys:1: is no key\n"
    file.write_text("# nothing\n")
    assert "has no key (upq --new-key" in fault()
    assert upq("--new-key", str(tmp_path / "no/where")).returncode == 73


# Seeing ----------------------------------------------------------------------------------------


def test_progress_and_output_are_seen_while_a_job_runs(daemon: Daemon) -> None:
    id = daemon.submit("slow")
    until(lambda: (daemon.job(id)["progress"] or {}).get("done") == 4)
    assert "is at 40% copying" in daemon.why(id)
    assert daemon.ask(f"why {id}")["progress"] == {"done": 4, "total": 10, "text": "copying"}
    assert "40% (4 of 10) copying" in cli(daemon, "jobs", "type:slow", "state:running").stdout
    live = daemon.ask(f"output {id}")
    assert (live["text"], live["running"], live["next"]) == ("one\n", True, 4)
    assert daemon.ask(f"show {id}")["attempts"][0]["output_bytes"] == 4
    assert daemon.ask(f"output {id} from:4")["text"] == ""
    daemon.open_gate("go")
    daemon.wait(id)
    ended = daemon.ask(f"output {id} from:4")
    assert (ended["text"], ended["running"], ended["next"]) == ("two\n", False, 8)
    assert daemon.ask(f"output {id}")["text"] == "one\ntwo\n"


def test_output_is_followed_to_the_end(daemon: Daemon) -> None:
    id = daemon.submit("slow")
    words = [sys.executable, "-u", str(ROOT / "upq-cli"), "-s", str(daemon.folder / "s")]
    with subprocess.Popen([*words, "output", str(id), "--follow"], env=daemon.environment(),
                          stdout=subprocess.PIPE, text=True) as follow:  # fmt: skip
        assert follow.stdout
        assert follow.stdout.readline() == "one\n"
        daemon.open_gate("go")
        assert follow.stdout.read() == "two\n"
        assert follow.wait(30) == 0


def test_a_terminal_sees_how_a_job_fares_that_is_waited_for(daemon: Daemon) -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, str(ROOT / "upq-cli"), "-s", str(daemon.folder / "s")]
    with subprocess.Popen([*words, "--wait", "slow"], env=daemon.environment() | {"COLUMNS": "80"},
                          stdout=subprocess.PIPE, stderr=theirs, text=True) as cli_:  # fmt: skip
        os.close(theirs)
        text = b""
        while b"40% (4 of 10) copying" not in text:
            text += os.read(ours, 4096)
        daemon.open_gate("go")
        assert cli_.stdout and re.fullmatch(r"ACK \d+\njob \d+ done\n", cli_.stdout.read())
        assert cli_.wait(30) == 0
    os.close(ours)


def test_attempts_tell_where_and_how_long_and_how_they_ended(daemon: Daemon) -> None:
    ended = daemon.run("fails times:2")
    shown = daemon.ask(f"show {ended['id']}")
    attempts = shown["attempts"]
    assert [(a["start"], a["attempt"], a["state"], a["reason"], a["message"], a["output_bytes"])
            for a in attempts] == [
        (1, 1, "failed", "retry 1 of 2", "no 1", 0),
        (2, 2, "failed", "retry 2 of 2", "no 2", 1),
        (3, 3, "done", "", "no 3", 2),
    ]  # fmt: skip
    assert all(a["node"] and a["started_at"] <= a["ended_at"] and a["took_s"] >= 0
               for a in attempts)  # fmt: skip
    assert shown["job"]["jobdata"] == {"n": 3, "times": "2"}, "each feeds the next (UPQ-74)"
    assert [e["state"] for e in shown["history"]] == ["queued", *["running", "queued"] * 2,
                                                      "running", "done"]  # fmt: skip
    assert daemon.ask(f"output {ended['id']} start:2")["text"] == "x"


def test_why_names_every_cause_in_one_sentence(daemon: Daemon) -> None:
    ids = [daemon.submit(f"busy n:{n}") for n in range(4)]
    until(lambda: "2 of 2 places" in daemon.why(ids[3]))
    told = daemon.ask(f"why {ids[3]}")
    assert re.fullmatch(
        rf"it waits since \S+Z: 2 of 2 places of busy are busy \(jobs {ids[0]}, {ids[1]}\);"
        r" 1 job is ahead of it", told["why"],
    ), told  # fmt: skip
    assert (told["ahead"], told["since"] <= when.iso(when.now())) == (1, True)
    daemon.ask("pause busy")
    daemon.ask("drain")
    later = daemon.submit("busy @in:1h")
    after = daemon.submit(f"busy @after:{ids[3]}")
    whys = {id: daemon.why(id) for id in (ids[3], later, after)}
    daemon.ask("resume")
    daemon.ask("resume busy")
    assert all("the daemon is drained" in why for why in whys.values())
    assert all("queue busy is paused" in why for why in whys.values())
    assert "it is not to start before 2" in whys[later]
    assert f"waits for {ids[3]}; it needs {ids[3]} (" in whys[after]
    assert all("\n" not in why and " ahead of it" in why for why in whys.values())
    for id in (later, after):
        daemon.ask(f"cancel {id}")


def test_a_retry_that_waits_says_after_what(daemon: Daemon) -> None:
    id = daemon.submit("weary")
    until(lambda: "retry 1 of 1" in daemon.job(id)["reason"])
    why = daemon.why(id)
    daemon.ask(f"cancel {id}")
    assert re.search(r"not to start before \S+Z \(retry 1 of 1: not today\)", why)


# Many at once ----------------------------------------------------------------------------------


def test_many_are_cancelled_and_retried(daemon: Daemon) -> None:
    first = [daemon.submit(f"bulk n:{n}") for n in range(2)]
    until(lambda: daemon.job(first[1])["state"] == "running")
    many = json.dumps({"submit_many": [{"submit": "bulk"}] * 1205})
    reply = json.loads(daemon.say(many))
    ids = [one["id"] for one in reply["jobs"]]
    others = daemon.submit("other @in:1h")
    told = daemon.ask("cancel type:bulk state:queued limit:5")
    assert (told["n"], told["ids"], told["denied"]) == (5, ids[:5], 0)
    told = daemon.ask("cancel queue:bulk state:queued")
    assert (told["n"], told["ids"]) == (1200, ids[5:105])
    assert daemon.job(others)["state"] == "queued"
    assert daemon.job(first[0])["state"] == "running"
    told = daemon.ask("cancel type:bulk")
    assert (told["n"], told["ids"]) == (2, first)
    assert daemon.wait(first[0])["state"] == "cancelled"
    daemon.ask("pause bulk")
    done = cli(daemon, "retry", "type:bulk", "state:cancelled", "since:1h")
    assert done.stdout.splitlines()[:2] == ["n\t1207", "denied\t0"]
    assert {daemon.job(id)["state"] for id in (ids[0], ids[-1])} == {"blocked"}
    assert daemon.history(ids[0]) == ["queued", "cancelled", "queued retry"]
    assert daemon.ask("cancel type:bulk limit:0")["n"] == 0
    assert daemon.ask("cancel type:nothing")["n"] == 0
    assert daemon.ask("cancel type:bulk since:0s")["n"] == 0
    assert daemon.ask("cancel type:bulk")["n"] == 1207
    daemon.ask("resume bulk")
    daemon.ask(f"cancel {others}")


def test_many_need_a_filter_that_fits(daemon: Daemon) -> None:
    for line in ("cancel", "retry", "cancel limit:5", "cancel type:busy state:done",
                 "retry type:busy state:done", "retry type:busy state:queued",
                 "cancel 1 type:busy", "cancel type:busy since:x"):  # fmt: skip
        assert daemon.say(line)[:10] in ("ERR bad_pa", "ERR not_fo"), line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_rights_are_those_of_each_job(daemon: Daemon) -> None:
    mine = [daemon.submit("other @in:1h") for _ in range(2)]
    (daemon.folder / "s").chmod(0o777)
    with acting_as("nobody"), daemon.talk() as talk:
        theirs = int(talk.say("other @in:1h").split()[1])
        told = json.loads(talk.say("cancel type:other state:queued").removeprefix("OK "))
        assert told == {"n": 1, "ids": [theirs], "denied": 2}
        listed = talk.say("jobs submitter:nobody type:other limit:5")
    assert [one["id"] for one in json.loads(listed[3:])["jobs"]][:1] == [theirs]
    assert {daemon.job(id)["state"] for id in mine} == {"queued"}
    assert daemon.ask("cancel type:other state:queued")["n"] == 2


def test_lists_are_paged(daemon: Daemon) -> None:
    ids = [daemon.submit("other @in:1h") for _ in range(5)][::-1]
    for filters in ("type:other state:queued", "queue:other state:queued"):
        seen: list[int] = []
        before = ""
        while True:
            page = daemon.ask(f"jobs {filters} limit:2 {before}")
            seen += [one["id"] for one in page["jobs"]]
            if page["next"] is None:
                break
            before = f"before:{page['next']}"
        assert seen == ids, filters
    daemon.ask("cancel type:other state:queued")
    ended = [one["id"] for one in daemon.ask("jobs state:cancelled type:other limit:5")["jobs"]]
    page = daemon.ask(f"jobs state:cancelled type:other limit:3 before:{ended[1]}")
    assert [one["id"] for one in page["jobs"]] == ended[2:5]
    assert daemon.ask("jobs submitter:nobody-at-all") == {"jobs": [], "next": None}
    assert daemon.say("jobs state:done before:999999999").startswith("ERR not_found")


# Retries ---------------------------------------------------------------------------------------

STORM = 1000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_storm_of_retries_is_spread_and_survives_a_restart(url: str, short_tmp: Path) -> None:
    body = "def run(self):\n    self.jobdata['n'] = self.jobdata.get('n', 0) + 1\n    return False"
    config = "[job storm]\nconcurrent = 4\nretries = 2\nretry_delay = 20s\nretry_backoff = 1\n"
    daemon = Daemon(short_tmp, config, "" if url.startswith("sqlite") else url, storm=body)
    with daemon:
        daemon.say(json.dumps({"submit_many": [{"submit": "storm"}] * STORM}))
        until(lambda: starts(daemon)[1] == STORM, 150)
        due = dues(daemon)
        threads = len(os.listdir(f"/proc/{daemon.process.pid}/task"))  # type: ignore[union-attr]
        daemon.restart()
        until(lambda: daemon.ask("status")["jobs"]["failed"] == STORM, 150)
        begun, found = attempts(daemon), starts(daemon)
    assert len(due) > STORM // 2
    largest = max(Counter((at - min(due.values())) // 10**6 for at in due.values()).values())
    beyond = sum(n for attempt, n in found.items() if attempt > 3)
    print(f"largest 1-s bucket {largest} of {STORM}, beyond max {beyond},"
          f" lost {STORM - found[3]}, threads in a wait {threads}")  # fmt: skip
    assert largest <= STORM // 10
    assert all(begun[attempt] >= at for attempt, at in due.items())
    assert (beyond, found[2], found[3]) == (0, STORM, STORM)
    assert threads < 30


def rows(daemon: Daemon, query: sa.Select[Any]) -> list[Any]:
    engine = sa.create_engine(daemon.url or f"sqlite:///{daemon.folder}/state/upq.db")
    with engine.connect() as connection:
        found = list(connection.execute(query))
    engine.dispose()
    return found


def attempts(daemon: Daemon) -> dict[tuple[int, int], int]:
    """When jobs have begun, by job and attempt; the last time, as a claim may be given back."""
    event = schema.event
    query = sa.select(event.c.job, event.c.attempt, sa.func.max(event.c.at))
    query = query.where(event.c.state == "running").group_by(event.c.job, event.c.attempt)
    return {(job, attempt): at for job, attempt, at in rows(daemon, query)}


def starts(daemon: Daemon) -> Counter[int]:
    """How many jobs have been started for the n-th time."""
    return Counter(attempt for _, attempt in attempts(daemon))


def dues(daemon: Daemon) -> dict[tuple[int, int], int]:
    """When the next attempts of those that wait are due, by job and attempt."""
    job = schema.job
    query = sa.select(job.c.id, job.c.attempt, job.c.run_at).where(job.c.run_at.is_not(None))
    return {(id, attempt + 1): at for id, attempt, at in rows(daemon, query)}
