from __future__ import annotations

import threading
import time

import pytest

from upq import UpqJob
from upq.errors import UpqError
from upq.plugins import MESSAGE_LIMIT, follow_up


def test_messages_add_up_to_their_limit() -> None:
    job = UpqJob("x", {})
    job.msg("one ")
    job.msg(2)
    job.msg(None)
    assert job.msgstr == "one 2None"
    job.msg("x" * MESSAGE_LIMIT)
    job.msg("y")
    assert len(job.msgstr) == MESSAGE_LIMIT


def test_a_jobs_words_and_settings() -> None:
    job = UpqJob("x", {"50": "", "fid": "7"}, {"path": "/tmp"}, attempt=3)
    assert job.args == ["50"]
    assert (job.getcfg("path"), job.getcfg("none"), job.getcfg("none", 5)) == ("/tmp", None, 5)
    assert job.retries == 2
    assert job.logger.name == "upq.jobs.x"
    assert job.check() is not False
    assert job.run() is not False


def test_steps_are_put_in_front_of_the_chain() -> None:
    job = UpqJob("x", {"a": 1}, chain=["last"])
    job.append_job("next", {"b": 2})
    assert follow_up(job)[0] == ["next", "last"]
    assert job.jobdata == {"a": 1, "b": 2}


def test_a_job_sees_that_it_is_cancelled() -> None:
    job = UpqJob("x", {})
    assert not job.cancelled
    job.cancel()
    assert job.cancelled
    assert job.cancel_event.wait(0)


def test_without_a_daemon_a_job_says_so() -> None:
    with pytest.raises(UpqError, match="does not run in a daemon"):
        UpqJob("x", {}).enqueue_newjob("y")


def test_only_the_jobs_own_thread_queues_jobs() -> None:
    job = UpqJob("x", {})
    raised: list[BaseException] = []

    def call() -> None:
        try:
            job.enqueue_newjob("y")
        except UpqError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "own thread" in str(raised[0])


def test_progress_is_stored_now_and_then_and_the_last_is_known() -> None:
    class Shown:
        seen: list[dict[str, object]] = []  # noqa: RUF012

        def progress(self, job: UpqJob, progress: dict[str, object]) -> None:
            self.seen.append(progress)

    job = UpqJob("x", {}, desk=Shown())  # type: ignore[arg-type]
    began = time.monotonic()
    for n in range(5000):
        job.progress(n, 5000, "busy")
    assert len(Shown.seen) <= 2 + (time.monotonic() - began) / 0.5
    assert Shown.seen[0]["done"] == 0
    assert job.last_progress == {"done": 4999, "total": 5000, "text": "busy"}
