from __future__ import annotations

import json
import os
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from upq import UpqJob
from upq.errors import Broken, UpqError
from upq.plugins import MESSAGE_LIMIT, Clipped, Loader, blame, follow_up, readable, stored_piece

JOB = "from upq import UpqJob\n\n\nclass Good(UpqJob):\n    pass\n"
MIB = 1 << 20


@pytest.fixture
def jobs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "jobs"
    folder.mkdir(mode=0o755)
    return folder


def put(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.py"
    file.write_text(text)
    file.chmod(0o644)
    return file


def fault(folder: Path, name: str) -> str:
    with pytest.raises(Broken) as broken:
        Loader(folder).load(name)
    return str(broken.value)


# Loading


def test_a_class_is_found_by_the_name_of_its_file(jobs_dir: Path) -> None:
    put(jobs_dir, "good", JOB)
    put(jobs_dir, "verify_local_file", JOB.replace("Good", "Verify_local_file"))
    loader = Loader(jobs_dir)
    assert loader.load("good").__name__ == "Good"
    assert loader.load("verify_local_file").__name__ == "Verify_local_file"
    assert loader.has("good")
    assert not loader.has("bad")


@pytest.mark.parametrize("name", ["json", "queue", "test", "upq"])
def test_a_job_named_like_a_library_is_not_the_library(jobs_dir: Path, name: str) -> None:
    put(jobs_dir, name, JOB.replace("Good", name.title()) + "\n\nimport json\njson.dumps(1)\n")
    found = Loader(jobs_dir).load(name)
    assert issubclass(found, UpqJob)
    assert sys.modules["json"] is json


def test_jobs_share_modules_of_their_folder(jobs_dir: Path) -> None:
    put(jobs_dir, "shared", "NAME = 'x'\n")
    put(jobs_dir, "good", JOB + "\n\nfrom upq_jobs.shared import NAME\nfrom . import shared\n")
    Loader(jobs_dir).load("good")


def test_a_new_loader_finds_the_files_as_they_are_now(jobs_dir: Path) -> None:
    put(jobs_dir, "shared", "N = 1\n")
    text = JOB + "    from upq_jobs.shared import N\n    n = N\n"
    put(jobs_dir, "good", text)
    old = Loader(jobs_dir).load("good")
    # The same size and, quick as this is, the same time: a byte code cache would be believed.
    put(jobs_dir, "shared", "N = 2\n")
    assert (Loader(jobs_dir).load("good").n, old.n) == (2, 1)
    assert not (jobs_dir / "__pycache__").exists()


def test_sys_path_is_never_looked_at(
    jobs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "other", JOB)
    monkeypatch.syspath_prepend(tmp_path)
    assert "no such file" in fault(jobs_dir, "other")


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("x = 1\nclass Good(UpqJob:\n", 2, "SyntaxError"),
        ("import nowhere_at_all\n", 1, "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def f():\n    return 1 / 0\n\n\nf()\n", 2, "ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", 2, "SystemExit: 3"),
        ("from upq_jobs.bad import X\n", 1, "ImportError"),
        ("import json\njson.loads('{')\n", 2, "JSONDecodeError"),
        ("a = '\0'\n", None, "null bytes"),
    ],
)
def test_a_broken_module_is_blamed_with_file_and_line(
    jobs_dir: Path, text: str, line: int | None, what: str
) -> None:
    put(jobs_dir, "bad", "")
    file = put(jobs_dir, "good", text)
    told = fault(jobs_dir, "good")
    assert what in told
    assert told.startswith(f"{file}:{line}: " if line else str(file))


def test_a_fault_in_a_shared_module_is_blamed_there(jobs_dir: Path) -> None:
    shared = put(jobs_dir, "shared", "x = 1\n\ny = x.z\n")
    put(jobs_dir, "good", "import upq_jobs.shared\n")
    assert fault(jobs_dir, "good").startswith(f"{shared}:3: AttributeError")


@pytest.mark.parametrize(
    "text", ["", "class Good:\n    pass\n", "Good = 5\n", JOB.replace("Good", "GooD")]
)
def test_a_module_without_its_class_is_broken(jobs_dir: Path, text: str) -> None:
    file = put(jobs_dir, "good", text)
    assert fault(jobs_dir, "good") == f"{file}: no class Good(UpqJob)"


def test_a_broken_module_leaves_the_others_alone(jobs_dir: Path) -> None:
    put(jobs_dir, "good", JOB)
    put(jobs_dir, "bad", "import sys\nsys.exit(1)\n")
    loader = Loader(jobs_dir)
    with pytest.raises(Broken):
        loader.load("bad")
    assert loader.load("good").__name__ == "Good"


def test_the_innermost_line_of_the_jobs_own_folder_is_blamed(jobs_dir: Path) -> None:
    file = put(
        jobs_dir,
        "good",
        JOB + "\n    def run(self):\n        import json\n        json.loads('x')\n",
    )
    job = Loader(jobs_dir).load("good")("good", {})
    with pytest.raises(ValueError) as raised:
        job.run()
    assert blame(raised.value, file).startswith(f"{file}:9: JSONDecodeError")


# Files that others could have written


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o777])
def test_a_file_that_others_can_write_is_refused(jobs_dir: Path, mode: int) -> None:
    file = put(jobs_dir, "good", JOB)
    os.chown(file, -1, other_group())
    file.chmod(mode)
    assert fault(jobs_dir, "good").startswith(f"{file}: others can write it")


def other_group() -> int:
    """A group that is nobody's own."""
    if os.getuid() != 0:
        pytest.skip("only root can give a file to another group")
    return 50  # staff


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_folder_that_others_can_write_is_refused(jobs_dir: Path, mode: int) -> None:
    put(jobs_dir, "good", JOB)
    os.chown(jobs_dir, -1, other_group())
    jobs_dir.chmod(mode)
    assert fault(jobs_dir, "good").startswith(f"{jobs_dir}: others can write it")


def test_a_folder_above_that_others_can_write_is_refused(tmp_path: Path) -> None:
    above = tmp_path / "above"
    (above / "jobs").mkdir(parents=True)
    put(above / "jobs", "good", JOB)
    above.chmod(0o757)
    assert fault(above / "jobs", "good").startswith(f"{above}: others can write it")


def test_a_file_of_another_user_is_refused(jobs_dir: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    file = put(jobs_dir, "good", JOB)
    os.chown(file, 65534, -1)
    assert "owned by uid 65534" in fault(jobs_dir, "good")


def test_a_link_out_of_the_folder_is_refused(jobs_dir: Path, tmp_path: Path) -> None:
    outside = put(tmp_path, "outside", JOB)
    (jobs_dir / "good.py").symlink_to(outside)
    assert "leads out of" in fault(jobs_dir, "good")


def test_a_link_within_the_folder_is_followed(jobs_dir: Path) -> None:
    put(jobs_dir, "real", JOB)
    (jobs_dir / "good.py").symlink_to("real.py")
    assert Loader(jobs_dir).load("good").__name__ == "Good"


def test_a_folder_that_is_itself_a_link_is_followed(jobs_dir: Path, tmp_path: Path) -> None:
    put(jobs_dir, "good", JOB)
    (tmp_path / "link").symlink_to(jobs_dir)
    assert Loader(tmp_path / "link").load("good").__name__ == "Good"


def test_a_shared_module_that_others_can_write_is_refused(jobs_dir: Path) -> None:
    shared = put(jobs_dir, "shared", "N = 1\n")
    put(jobs_dir, "good", JOB + "import upq_jobs.shared\n")
    shared.chmod(0o646)
    assert f"{shared}: others can write it" in fault(jobs_dir, "good")


def test_what_a_refused_file_holds_is_never_run(jobs_dir: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    put(jobs_dir, "good", f"open({str(canary)!r}, 'w')\n" + JOB).chmod(0o646)
    fault(jobs_dir, "good")
    assert not canary.exists()


# Output


def test_output_below_its_limit_is_kept_whole() -> None:
    out = Clipped(100)
    assert out.write("x" * 60) == 60
    out.write("y" * 40)
    assert out.kept() == ("x" * 60 + "y" * 40, 100, False)


def test_output_over_its_limit_keeps_head_and_tail() -> None:
    out = Clipped(100)
    out.write("a" * 1000)
    out.write("b" * 1000)
    text, size, truncated = out.kept() or ("", 0, False)
    assert (size, truncated) == (2000, True)
    assert text == "a" * 50 + "\n[... 1900 bytes left out ...]\n" + "b" * 50


def test_no_output_is_none() -> None:
    assert Clipped().kept() is None


@given(some.lists(some.text(max_size=30), max_size=12), some.integers(2, 60))
def test_output_is_clipped_wherever_it_is_cut(parts: list[str], limit: int) -> None:
    out = Clipped(limit)
    whole = b""
    for part in parts:
        out.write(part)
        whole += part.encode()
    kept = out.kept()
    if not whole:
        assert kept is None
        return
    half = limit // 2
    assert kept is not None
    assert kept.size_bytes == len(whole)
    as_text = whole.decode().replace("\0", "\\0")
    assert kept.truncated == (len(as_text.encode()) > 2 * half)
    if not kept.truncated:
        assert kept.text == as_text
    else:
        head, tail = readable(whole[:half])[:half], readable(whole[half:][-half:])[-half:]
        left_out = max(len(whole) - 2 * half, 0) or "some"
        gap = f"\n[... {left_out} bytes left out ...]\n"
        assert kept.text == head.decode(errors="ignore") + gap + tail.decode(errors="ignore")


def test_binary_output_is_not_longer_as_text_than_its_limit_allows() -> None:
    for byte in b"\0", b"\xff":
        out = Clipped(1000)
        out.write_bytes(byte * 900)
        kept = out.kept()
        assert kept is not None
        assert (kept.size_bytes, kept.truncated) == (900, True)
        assert len(kept.text.encode()) < 1050
        assert "\0" not in kept.text


def test_output_that_is_no_text_is_kept_readable() -> None:
    out = Clipped()
    out.write_bytes(b"\xff\xfe caf\xc3\xa9\n")
    out.write("a\ud800b")
    kept = out.kept()
    assert kept is not None
    assert kept.text == "\ufffd\ufffd café\na?b"


@pytest.mark.parametrize("part", [b"x" * (64 << 10), b"x" * (32 * MIB), b"line of text\n" * 8])
def test_memory_stays_bounded_whatever_is_written(part: bytes) -> None:
    out = Clipped(MIB)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(64 * MIB // max(len(part), 4096)):
        out.write_bytes(part)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 4 * MIB


def test_threads_that_write_at_once_lose_nothing() -> None:
    out = Clipped(10 * MIB)
    threads = [
        threading.Thread(target=lambda c=c: [out.write(c * 100 + "\n") for _ in range(200)])  # type: ignore[misc]
        for c in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = out.kept()
    assert kept is not None
    lines = kept.text.splitlines()
    assert {line: lines.count(line) for line in set(lines)} == {c * 100: 200 for c in "abcd"}


# What a job class calls


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


# Output as it comes


def test_hidden_texts_are_masked_however_they_come() -> None:
    out = Clipped(1000, ["hunter2", "hunter"])
    for part in ("a hun", "ter2 b hunter c", " hunt", "ed hunter2"):
        out.write(part)
    kept = out.kept()
    assert kept and kept.text == "a *** b *** c hunted ***"
    out.write(" hunt")
    kept = out.kept()
    assert kept and kept.text.endswith(" ***"), "half a secret at the end is none to show"


@pytest.mark.parametrize("limit", [10, 64])
def test_pieces_make_the_whole(limit: int) -> None:
    out, text, at = Clipped(limit), "", 0
    for word in "one", "zwei é", "", "drei\n":
        out.write(word)
        piece = out.since(at)
        text, at = text + piece.text, piece.next
    assert text == "onezwei édrei\n"
    assert out.since(at).text == ""
    kept = out.kept()
    assert kept
    assert stored_piece(kept.text, kept.size_bytes, 0).text == kept.text
    assert stored_piece(kept.text, kept.size_bytes, at).text == ""
    assert stored_piece(kept.text, kept.size_bytes, at - 2).text == "i\n"


def test_half_a_character_waits_for_its_other_half() -> None:
    out = Clipped(100)
    out.write_bytes("aé".encode()[:2])
    assert out.since(0)[:2] == ("a", 1)
    out.write_bytes("é".encode()[1:])
    assert out.since(1)[:2] == ("é", 3)


def test_what_was_left_out_is_said_to_who_comes_late() -> None:
    out = Clipped(10)
    for n in range(10):
        out.write(f"{n}" * 10)
    assert out.since(0).text.startswith("00000\n[... ")
    assert out.since(97).text == "999"
    kept = out.kept()
    assert kept and stored_piece(kept.text, kept.size_bytes, 97).text == "999"
    late = stored_piece(kept.text, kept.size_bytes, 50).text
    assert late == "\n[... 45 bytes left out ...]\n99999"


# Parameters of a class


def test_a_class_has_its_parameters_as_attributes(jobs_dir: Path) -> None:
    text = JOB.replace("    pass", "    fid: int\n    path: Path | None = None")
    put(jobs_dir, "good", f"from pathlib import Path\n{text}")
    cls: Any = Loader(jobs_dir).load("good")
    job = cls("good", {"fid": 5, "path": "/a"})
    assert (job.fid, job.path, str(cls.declared)) == (5, Path("/a"), "fid:int path:path?")
    assert cls("good", {"fid": 5}).path is None


@pytest.mark.parametrize("name", ["output", "result", "retries", "declared"])
def test_an_annotation_at_fault_breaks_its_type_with_its_line(jobs_dir: Path, name: str) -> None:
    put(jobs_dir, "good", JOB.replace("    pass", f"    fid: int\n    {name}: str"))
    assert fault(jobs_dir, "good") == (
        f"{jobs_dir}/good.py:6: {name}: every job has an attribute of that name; choose another"
    )
