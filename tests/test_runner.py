from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest

from tests.stores import Store
from upq import UpqJob, config, when
from upq.job import CANCELLED, DONE, FAILED, QUEUED, RESULT_LIMIT_BYTES, Job
from upq.jobtypes import JobTypes
from upq.plugins import MESSAGE_LIMIT
from upq.runner import Runner


class Shop:
    """Job types of a folder, and a runner for them over a store."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self.store = store
        (folder / "jobs").mkdir()
        self.sections = ""

    def offer(self, name: str = "work", run: str = "pass", rest: str = "", **settings: str) -> None:
        """A job type: the body of its run(), and what else its class has."""
        text = (
            f"from upq import Abort, Retry, UpqJob\n\n\nclass {name.title()}(UpqJob):\n"
            f"    def run(self):\n{indent(dedent(run), ' ' * 8)}\n\n"
            f"{indent(dedent(rest), '    ')}\n"
        )
        (self.folder / f"jobs/{name}.py").write_text(text)
        values = "".join(f"{key} = {value}\n" for key, value in settings.items())
        self.sections += f"[job {name}]\n{values}"

    def open(self) -> Runner:
        (self.folder / "upq.cfg").write_text(f"[paths]\njobs_dir = jobs\n{self.sections}")
        return Runner(self.store.queue, JobTypes(config.load(self.folder / "upq.cfg")))

    def claimed(self, **new: Any) -> Job:
        self.store.submit("work", **new)
        return self.store.claim_one("work")

    def run(self, begun: Callable[[UpqJob], None] = lambda job: None, **new: Any) -> dict[str, Any]:
        """One attempt of a job of type `work`; how it is shown afterwards."""
        runner, claimed = self.open(), self.claimed(**new)
        runner.run(claimed, begun)
        self.store.flush()
        return self.store.views.job(claimed.id)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with Store(f"sqlite:///{tmp_path}/upq.db") as store:
        yield Shop(tmp_path, store)


# What an attempt means


@pytest.mark.parametrize("returned", ["None", "True", "0", "''", "[]"])
def test_anything_but_false_is_success(shop: Shop, returned: str) -> None:
    shop.offer(run=f"self.msg('well')\nreturn {returned}")
    seen = shop.run()
    assert (seen["state"], seen["message"]) == (DONE, "well")
    assert seen["result"] == (None if returned in ("None", "True") else eval_literal(returned))


def eval_literal(text: str) -> Any:
    return {"0": 0, "''": "", "[]": []}[text]


def test_false_is_failure(shop: Shop) -> None:
    shop.offer(run="self.msg('no such file')\nreturn False")
    seen = shop.run()
    assert (seen["state"], seen["message"], seen["result"]) == (FAILED, "no such file", None)


def test_an_assigned_result_wins(shop: Shop) -> None:
    shop.offer(run="self.result = {'sum': 1}\nreturn 'other'")
    assert shop.run()["result"] == {"sum": 1}


def test_a_failed_job_keeps_its_assigned_result(shop: Shop) -> None:
    shop.offer(run="self.result = 5\nreturn False")
    assert shop.run()["result"] == 5


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("ValueError('bad value')", "ValueError: bad value"),
        ("KeyError('x')", "KeyError: 'x'"),
        ("SystemExit(3)", "SystemExit: 3"),
        ("KeyboardInterrupt()", "KeyboardInterrupt"),
        ("GeneratorExit()", "GeneratorExit"),
        ("RecursionError()", "RecursionError"),
        ("UnicodeDecodeError('utf-8', b'\\xff', 0, 1, 'why')", "UnicodeDecodeError"),
    ],
)
def test_an_exception_fails_the_job_with_file_and_line(shop: Shop, raised: str, told: str) -> None:
    shop.offer(run=f"self.msg('begun')\nraise {raised}")
    seen = shop.run()
    assert seen["state"] == FAILED
    assert seen["message"].startswith(f"begun {shop.folder}/jobs/work.py:7: {told}")


def test_what_cannot_even_be_shown_fails_the_job(shop: Shop) -> None:
    shop.offer(
        run="class Odd(Exception):\n    def __str__(self):\n        raise ValueError\nraise Odd"
    )
    assert shop.run()["state"] == FAILED


def test_a_retry_waits_and_counts(shop: Shop) -> None:
    shop.offer(run="raise Retry('busy', after=60)", retries="2")
    before = when.now()
    seen = shop.run()
    assert (seen["state"], seen["reason"], seen["message"]) == (QUEUED, "retry 1 of 2", "busy")
    run_at = shop.store.row(seen["id"]).run_at
    assert before + 60_000_000 <= run_at <= when.now() + 60_000_000
    assert seen["attempt"] == 1


@pytest.mark.parametrize("after", ["1e12", "'soon'", "float('nan')", "float('inf')", "10**400"])
def test_a_retry_after_no_time_at_all_is_told_with_its_line(shop: Shop, after: str) -> None:
    shop.offer(run=f"raise Retry('busy', after={after})", retries="2")
    seen = shop.run()
    assert (seen["state"], seen["reason"]) == (QUEUED, "retry 1 of 2")
    assert re.search(r"jobs/\w+\.py:\d+: ValueError: after: .* is not a number", seen["message"])


def test_a_retry_in_the_past_is_one_at_once(shop: Shop) -> None:
    shop.offer(run="raise Retry('busy', after=-5)", retries="2")
    seen = shop.run()
    assert (seen["state"], seen["message"]) == (QUEUED, "busy")


def test_after_the_last_retry_a_job_has_failed(shop: Shop) -> None:
    shop.offer(run="raise Retry('busy', after=0)", retries="2")
    runner, claimed = shop.open(), shop.claimed()
    for _ in range(2):
        runner.run(claimed, lambda job: None)
        shop.store.flush()
        shop.store.queue.stage()
        claimed = shop.store.claim_one("work")
    runner.run(claimed, lambda job: None)
    shop.store.flush()
    seen = shop.store.views.job(claimed.id)
    assert (seen["state"], seen["attempt"]) == (FAILED, 3)


def test_a_submit_may_ask_for_its_own_retries(shop: Shop) -> None:
    shop.offer(run="return False", retries="0")
    assert shop.run(options={"retries": 1})["state"] == QUEUED


def test_abort_fails_for_good(shop: Shop) -> None:
    shop.offer(run="raise Abort('never')", retries="5")
    seen = shop.run()
    assert (seen["state"], seen["message"], seen["reason"]) == (FAILED, "never", "aborted")


@pytest.mark.parametrize(
    "result", ["object()", "{1, 2}", "b'x'", "float('nan')", "float('inf')", "{(1, 2): 3}", "deep"]
)
def test_a_result_that_is_no_json_fails_the_job(shop: Shop, result: str) -> None:
    shop.offer(run=f"deep = []\nfor _ in range(100_000):\n    deep = [deep]\nreturn {result}")
    seen = shop.run()
    assert (seen["state"], seen["result"]) == (FAILED, None)
    assert "result is no JSON" in seen["message"] or "RecursionError" in seen["message"]


def test_a_result_over_its_limit_fails_the_job(shop: Shop) -> None:
    shop.offer(run="return 'x' * self.jobdata['n']")
    assert shop.run(params={"n": RESULT_LIMIT_BYTES - 2})["state"] == DONE
    seen = Shop.run(shop, params={"n": RESULT_LIMIT_BYTES})
    assert seen["state"] == FAILED
    assert f"more than {RESULT_LIMIT_BYTES}" in seen["message"]


@pytest.mark.parametrize("value", ["object()", "{self}", "float('nan')", "b'x'"])
def test_jobdata_that_is_no_json_any_more_is_not_kept(
    shop: Shop, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop.offer(run=f"self.jobdata['x'] = {value}")
    seen = shop.run(params={"fid": 1})
    assert (seen["state"], seen["jobdata"]) == (DONE, {"fid": 1})
    assert "jobdata" in caplog.text


@pytest.mark.parametrize("value", ["None", "[1, 2]", "'text'", "5"])
def test_jobdata_that_is_no_dict_any_more_is_not_kept(shop: Shop, value: str) -> None:
    shop.offer(run=f"self.jobdata = {value}\nraise Retry('again', after=0)", retries="5")
    runner, claimed = shop.open(), shop.claimed(params={"fid": 1})
    runner.run(claimed, lambda job: None)
    shop.store.flush()
    shop.store.queue.stage()
    assert shop.store.claim_one("work").data == {"fid": 1}


def test_jobdata_over_its_limit_fails_the_job_and_starts_nothing_after_it(shop: Shop) -> None:
    shop.offer("after")
    shop.offer(run="self.msg('so:')\nself.jobdata['x'] = 'x' * self.jobdata['n']", subjobs="after")
    rest = len('{"n":1000000,"x":""}')
    seen = shop.run(params={"n": RESULT_LIMIT_BYTES - rest})
    assert (seen["state"], len(shop.store.views.children(seen["id"]))) == (DONE, 1)
    assert len(seen["jobdata"]["x"]) == RESULT_LIMIT_BYTES - rest
    over = {"n": RESULT_LIMIT_BYTES - rest + 1}
    seen = Shop.run(shop, params=over)
    told = f"so: jobdata has {RESULT_LIMIT_BYTES + 1} bytes, more than {RESULT_LIMIT_BYTES}"
    assert (seen["state"], seen["message"], seen["jobdata"]) == (FAILED, told, over)
    assert shop.store.views.children(seen["id"]) == []


def test_an_attempt_that_fails_with_too_much_jobdata_says_so_and_the_next_has_the_old(
    shop: Shop,
) -> None:
    shop.offer(run="self.jobdata['x'] = 'x' * (1 << 20)\nreturn False", retries="1")
    seen = shop.run(params={"fid": 1})
    assert (seen["state"], seen["jobdata"]) == (QUEUED, {"fid": 1})
    assert "jobdata has 1048" in seen["message"]


def test_params_as_long_as_a_line_allows_are_no_fault_of_a_job_that_leaves_them(shop: Shop) -> None:
    shop.offer(run="return len(self.jobdata['text'])")
    seen = shop.run(params={"text": "ä" * (1 << 19)})
    assert (seen["state"], seen["result"]) == (DONE, 1 << 19)


def test_a_message_that_is_cut_says_why_the_job_has_failed(shop: Shop) -> None:
    shop.offer(run="self.msg('x' * (2 << 20))\nraise ValueError('the reason')")
    message = shop.run()["message"]
    assert len(message) == MESSAGE_LIMIT
    assert message.startswith("xxx")
    assert message.endswith("ValueError: the reason")


@pytest.mark.parametrize(
    "run", ["self.msgstr = 'x' * (3 << 20)", "raise ValueError('x' * (3 << 20))"]
)
def test_a_message_has_its_limit_however_it_was_made(shop: Shop, run: str) -> None:
    shop.offer(run=run)
    assert len(shop.run()["message"]) == MESSAGE_LIMIT


def test_jobdata_reaches_the_next_attempt_and_params_stay(shop: Shop) -> None:
    shop.offer(run="self.jobdata['seen'] = [1]\nraise Retry('again', after=0)", retries="5")
    runner, claimed = shop.open(), shop.claimed(params={"fid": [1]})
    runner.run(claimed, lambda job: None)
    shop.store.flush()
    shop.store.queue.stage()
    again = shop.store.claim_one("work")
    assert (again.params, again.data) == ({"fid": [1]}, {"fid": [1], "seen": [1]})


@pytest.mark.parametrize("value", ["None", "5", "b'bytes'", "['a']", "Exception('x')"])
def test_a_message_that_is_no_text_is_shown_all_the_same(shop: Shop, value: str) -> None:
    shop.offer(run=f"self.msgstr = {value}")
    assert shop.run()["state"] == DONE


@pytest.mark.parametrize("done", ["float('inf')", "float('nan')", "object()", "10**400"])
def test_a_progress_that_is_no_number_does_no_harm(shop: Shop, done: str) -> None:
    shop.offer(run=f"try:\n    self.progress({done}, 1)\nexcept Exception:\n    pass")
    assert shop.run()["state"] in (DONE, FAILED)


@pytest.mark.parametrize(
    "rest",
    [
        "def __init__(self):\n    pass",
        "def __init__(self, *args, **kw):\n    raise SystemExit(1)",
        "finished = None\ndef capture(self):\n    raise ValueError\ncaptured = capture",
        "def check(self):\n    import sys\n    sys.exit(1)",
        "def check(self):\n    raise KeyboardInterrupt",
        "def check(self):\n    self.jobdata['x'] = object()\n    return False",
    ],
)
def test_whatever_a_class_does_its_job_has_an_end(shop: Shop, rest: str) -> None:
    shop.offer(rest=rest)
    seen = shop.run()
    assert seen["state"] == FAILED
    assert shop.store.queue.release_strays() == []


# Before it runs


def test_check_may_refuse_at_the_run(shop: Shop) -> None:
    shop.offer(
        run="raise ValueError",
        rest="def check(self):\n    self.msg('file is gone')\n    return False",
        retries="5",
    )
    seen = shop.run()
    assert (seen["state"], seen["message"], seen["reason"]) == (FAILED, "file is gone", "refused")


def test_what_check_puts_on_the_object_is_there_at_the_run(shop: Shop) -> None:
    shop.offer(
        run="return self.path", rest="def check(self):\n    self.path = '/x'\n    self.msg('m')"
    )
    seen = shop.run()
    assert (seen["result"], seen["message"]) == ("/x", "")


def test_params_that_fit_no_more_fail_the_job(shop: Shop) -> None:
    shop.offer(params="fid:int")
    seen = shop.run(params={"fid": "not a number"})
    assert (seen["state"], seen["reason"]) == (FAILED, "bad params")


def test_a_job_whose_type_is_gone_goes_back_and_does_not_count(shop: Shop) -> None:
    shop.offer("other")
    seen = shop.run()
    assert (seen["state"], seen["attempt"]) == (QUEUED, 0)
    assert "no job type work" in seen["message"]


def test_a_job_whose_type_is_broken_goes_back_and_does_not_count(shop: Shop) -> None:
    shop.offer()
    (shop.folder / "jobs/work.py").write_text("import nowhere\n")
    seen = shop.run()
    assert (seen["state"], seen["attempt"]) == (QUEUED, 0)
    assert "work.py:1" in seen["message"]


# Cancelled, interrupted


def test_a_job_cancelled_before_it_began_does_not_run(shop: Shop) -> None:
    shop.offer(run="return 'ran'")
    seen = shop.run(begun=UpqJob.cancel)
    assert (seen["state"], seen["result"]) == (CANCELLED, None)


def test_a_cancel_asked_of_an_earlier_run_holds(shop: Shop) -> None:
    shop.offer(run="return 'ran'")
    runner, claimed = shop.open(), shop.claimed()
    runner.run(claimed._replace(cancel_asked=True), lambda job: None)
    shop.store.flush()
    assert shop.store.views.job(claimed.id)["state"] == CANCELLED


@pytest.mark.parametrize("end", ["return False", "raise ValueError", "raise Retry('x')"])
def test_a_job_that_fails_once_it_is_cancelled_is_cancelled(shop: Shop, end: str) -> None:
    shop.offer(run=f"self.cancel()\n{end}", retries="5")
    assert shop.run()["state"] == CANCELLED


def test_a_cancelled_job_that_ends_well_is_done(shop: Shop) -> None:
    shop.offer(run="self.cancel()\nreturn 7")
    seen = shop.run()
    assert (seen["state"], seen["result"]) == (DONE, 7)


def test_an_interrupted_attempt_does_not_count(shop: Shop) -> None:
    shop.offer(run="self.interrupted = True\nreturn False", retries="0")
    seen = shop.run()
    assert (seen["state"], seen["reason"], seen["attempt"]) == (QUEUED, "interrupted", 0)


def test_an_interrupted_attempt_that_ended_well_is_done(shop: Shop) -> None:
    shop.offer(run="self.interrupted = True")
    assert shop.run()["state"] == DONE


@pytest.mark.parametrize("error", ["Unavailable", "Uncertain"])
def test_a_database_that_was_away_is_not_the_jobs_fault(shop: Shop, error: str) -> None:
    shop.offer(run=f"from upq.errors import {error}\nraise {error}('away')", retries="0")
    seen = shop.run()
    assert (seen["state"], seen["attempt"]) == (QUEUED, 0)
    assert shop.store.row(seen["id"]).run_at > when.now()


# What is kept, and what follows


def test_output_and_the_last_progress_are_kept(shop: Shop) -> None:
    class Silent:
        def progress(self, job: UpqJob, progress: dict[str, Any]) -> None:
            """Too often to be stored."""

    shop.offer(
        run="print('hello', file=self.output)\nfor n in range(9):\n    self.progress(n, 9, 'x')"
    )
    runner, claimed = shop.open(), shop.claimed()
    runner.desk = Silent()  # type: ignore[assignment]
    runner.run(claimed, lambda job: None)
    shop.store.flush()
    assert shop.store.views.output(claimed.id)["text"] == "hello\n"
    assert shop.store.views.job(claimed.id)["progress"] == {"done": 8, "total": 9, "text": "x"}


@pytest.mark.parametrize(("end", "follows"), [("pass", 1), ("return False", 0)])
def test_the_chain_goes_on_after_success_only(shop: Shop, end: str, follows: int) -> None:
    shop.offer("second")
    shop.offer("third")
    shop.offer(run=f"self.jobdata['hash'] = 'abc'\n{end}", subjobs="second third")
    seen = shop.run(params={"fid": 1}, submitter="uid:33")
    followers = shop.store.claim(9, "second")
    assert len(followers) == follows
    for one in followers:
        assert one.params == {"fid": 1, "hash": "abc"}
        assert one.options["chain"] == ["third"]
        assert (one.parent, one.root, one.submitter) == (seen["id"], seen["id"], "uid:33")


def test_a_failed_attempt_with_another_to_come_calls_for_nothing(shop: Shop) -> None:
    shop.offer("notify")
    shop.offer(run="return False", retries="1", notify_fail="syslog")
    assert shop.run()["state"] == QUEUED
    assert shop.store.claim(9, "notify") == []


@pytest.mark.parametrize("end", ["return False", "raise ValueError('x')", "raise SystemExit(1)"])
def test_each_way_to_fail_tells_those_who_want_to_know(shop: Shop, end: str) -> None:
    shop.offer("notify")
    shop.offer(
        run=end, notify_fail="syslog mail:a@example.org", notify_success="mail:b@example.org"
    )
    seen = shop.run()
    told = shop.store.claim(9, "notify")
    assert {one.params["target"] for one in told} == {"syslog", "mail:a@example.org"}
    assert {one.params["job"]["jobid"] for one in told} == {seen["id"]}
    assert {one.params["job"]["msgstr"] for one in told} == {seen["message"]}


def test_an_end_is_kept_while_what_follows_cannot_be_numbered(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower needs an id from the database, which is away just now."""
    from upq import runner as module
    from upq.errors import Unavailable

    shop.offer("second")
    shop.offer(subjobs="second")
    runner, claimed = shop.open(), shop.claimed()
    reserve, away = shop.store.queue.reserve_ids, [1, 1]

    def reserve_ids(k: int) -> int:
        if away:
            away.pop()
            raise Unavailable("away")
        return reserve(k)

    monkeypatch.setattr(module, "AWAY_RETRY_S", 0.01)
    monkeypatch.setattr(shop.store.queue, "reserve_ids", reserve_ids)
    runner.run(claimed, lambda job: None)
    shop.store.flush()
    assert away == []
    assert shop.store.views.job(claimed.id)["state"] == DONE
    assert len(shop.store.claim(9, "second")) == 1


def test_a_job_given_back_does_not_count(shop: Shop) -> None:
    shop.offer()
    runner, claimed = shop.open(), shop.claimed()
    runner.give_back(claimed, "drained")
    shop.store.flush()
    seen = shop.store.views.job(claimed.id)
    assert (seen["state"], seen["reason"], seen["attempt"]) == (QUEUED, "drained", 0)
    assert shop.store.claim_one("work").id == claimed.id
