"""Log lines in real files, pipes and descriptors."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from upq import log

logger = logging.getLogger("upq.test_log")


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    """Puts the root logger back as pytest had it."""
    root = logging.getLogger()
    level, raising = root.level, logging.raiseExceptions
    yield
    for handler in [h for h in root.handlers if isinstance(h, log.LineHandler)]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.raiseExceptions = raising


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "upq.log"


def messages(file: Path) -> list[str]:
    """The lines without time and level."""
    return [line[32:] for line in file.read_text().splitlines()]


def at(second: int, text: str) -> logging.LogRecord:
    """A record of a given second, so that no test waits for one."""
    record = logging.LogRecord("upq", logging.INFO, "", 0, text, None, None)
    record.created, record.msecs = float(second), 0.0
    return record


def raise_in(text: str) -> None:
    raise RuntimeError(text)


# How a line reads.


def test_a_line_has_time_level_and_message(file: Path) -> None:
    log.setup(logfile=file)
    logger.info("ready, %d jobs", 3)
    logger.warning("slow")
    first, second = file.read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO    ready, 3 jobs", first)
    assert second.endswith(" WARNING slow")


def test_lines_below_the_level_are_not_written(file: Path) -> None:
    log.setup("warning", logfile=file)
    logger.info("quiet")
    logger.error("loud")
    assert messages(file) == ["loud"]


def test_the_format_is_the_configured_one(file: Path) -> None:
    log.setup(logformat="%(levelname)s:%(name)s:%(message)s", logfile=file)
    logger.info("hello")
    assert file.read_text() == "INFO:upq.test_log:hello\n"


def test_lines_of_a_job_carry_its_id(file: Path) -> None:
    log.setup(logfile=file)
    with log.job("test", 17):
        logger.info("half way")
        logging.getLogger("some.library").info("too")
        with log.job("child", 18):
            logger.info("inside")
        logger.info("back")
    logger.info("outside")
    assert messages(file) == [
        "(test:17) half way",
        "(test:17) too",
        "(child:18) inside",
        "(test:17) back",
        "outside",
    ]


def test_a_line_that_names_its_job_already_is_left_as_it_is(file: Path) -> None:
    log.setup(logfile=file)
    with log.job("test", 17):
        logger.info("(%s:%d) finished: ok", "test", 17)
    assert messages(file) == ["(test:17) finished: ok"]


def test_a_job_ends_with_its_block_even_by_an_exception(file: Path) -> None:
    log.setup(logfile=file)
    with pytest.raises(RuntimeError), log.job("test", 17):
        raise_in("x")
    logger.info("after")
    assert messages(file) == ["after"]


def test_jobs_of_other_threads_do_not_mix(file: Path) -> None:
    log.setup(logfile=file)
    with log.job("test", 17):
        thread = threading.Thread(target=logger.info, args=("elsewhere",))
        thread.start()
        thread.join()
    assert messages(file) == ["elsewhere"]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a\r\n2026-01-01 00:00:00,000 INFO    forged", r"a\r\n2026-01-01"),
        ("\x1b[2J\x07\x00\x7f\x9b", r"\x1b[2J\x07\x00\x7f\x9b"),
        ("a\u2028b\u2029c\x85d\x0be", r"a\u2028b\u2029c\x85d\x0be"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("Grüße, 文字", "Grüße, 文字"),
        ("\udc80", r"\udc80"),
    ],
    ids=["forged line", "terminal codes", "other line ends", "reversed", "plain", "not unicode"],
)
def test_one_record_is_one_line(file: Path, text: str, written: str) -> None:
    log.setup(logfile=file).handle(at(100, f"job said {text}"))
    assert file.read_bytes().count(b"\n") == 1
    assert messages(file)[0].startswith(f"job said {written}")


def test_a_traceback_follows_indented_and_forges_no_line(file: Path) -> None:
    log.setup(logfile=file)
    try:
        raise_in("first\n2026-01-01 00:00:00,000 INFO    forged")
    except RuntimeError:
        logger.exception("our fault")
    first, *rest = file.read_text().splitlines()
    assert first.endswith(" ERROR   our fault")
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-2] == "    RuntimeError: first"
    assert all(line.startswith("    ") for line in rest)


def test_a_log_call_with_wrong_arguments_still_gets_out(file: Path) -> None:
    log.setup(logfile=file)
    logger.info("%d jobs", "three")
    assert messages(file)[0].startswith("%d jobs [not formatted: TypeError(")


def test_json_lines_are_objects(file: Path) -> None:
    log.setup(logformat="json", logfile=file)
    with log.job("test", 17):
        logger.info("two\nlines")
    try:
        raise_in("x")
    except RuntimeError:
        logger.exception("our fault")
    first, second = map(json.loads, file.read_text().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {
        "level": "info",
        "type": "test",
        "job": 17,
        "logger": "upq.test_log",
        "message": "two\nlines",
    }
    assert second["trace"].endswith("RuntimeError: x\n")
    assert "job" not in second


@pytest.mark.parametrize("text", ["", "json", log.PLAIN, log.JOURNAL, "%(name)s|%(message)-9s|"])
def test_good_formats_pass(text: str) -> None:
    assert log.check_format(text) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("%(asctime)s", "%(message)s is missing"),
        ("%(mesage)s %(message)s", "mesage"),
        ("%(message)d", "not a log format"),
        ("%(message)s %", "not a log format"),
        ("%s", "not a log format"),
        ("plain words", "not a log format"),
    ],
)
def test_bad_formats_are_told(text: str, fault: str) -> None:
    assert fault in (log.check_format(text) or "")


def test_statements_are_logged_on_one_line_when_asked_for(file: Path) -> None:
    log.setup(logfile=file)
    log.statement("SELECT 1")
    log.setup("debug", logfile=file)
    log.statement("SELECT 2")
    log.setup("warning", logfile=file, statements=True)
    log.statement("SELECT 3\nFROM  job")
    logging.getLogger("test").info("not this")
    (line,) = file.read_text().splitlines()
    assert line.endswith(" DEBUG   SELECT 3 FROM job")


# Where lines go.


def test_a_rotated_file_is_followed_within_a_second(file: Path) -> None:
    handler = log.setup(logfile=file)
    handler.handle(at(100, "before"))
    file.rename(file.with_suffix(".1"))
    handler.handle(at(101, "after"))
    assert messages(file) == ["after"]
    assert messages(file.with_suffix(".1")) == ["before"]


def test_reopen_follows_at_once(file: Path) -> None:
    handler = log.setup(logfile=file)
    handler.handle(at(100, "before"))
    file.rename(file.with_suffix(".1"))
    handler.handle(at(100, "still the old one"))
    handler.reopen()
    handler.handle(at(100, "after"))
    assert messages(file) == ["after"]
    assert messages(file.with_suffix(".1")) == ["before", "still the old one"]


def test_a_file_cut_in_place_is_written_from_its_start(file: Path) -> None:
    log.setup(logfile=file)
    logger.info("before")
    os.truncate(file, 0)
    logger.info("after")
    assert messages(file) == ["after"]


def test_when_the_new_file_cannot_be_opened_the_old_one_goes_on(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = log.setup(logfile=file)
    moved = file.parent.with_name("moved")
    file.parent.rename(moved)
    for second in (100, 101, 102):
        handler.handle(at(second, "goes on"))
    assert messages(moved / file.name) == 3 * ["goes on"]
    assert capfd.readouterr().err.count(f"upq: cannot open {file}: ") == 1
    moved.rename(file.parent)
    file.unlink()
    handler.handle(at(103, "found again"))
    assert messages(file) == ["found again"]


def test_nobody_else_may_read_or_inherit_the_file(file: Path) -> None:
    handler = log.setup(logfile=file)
    assert file.stat().st_mode & 0o007 == 0
    handler.reopen()
    assert not os.get_inheritable(handler._fd)


def test_a_second_setup_takes_the_place_of_the_first(file: Path) -> None:
    log.setup(logfile=file.with_name("first.log"))
    log.setup("debug", logfile=file)
    logger.debug("once")
    assert messages(file) == ["once"]
    assert file.with_name("first.log").read_text() == ""
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert [path for path in opened if path.startswith(f"{file.parent}/")] == [str(file)]


def test_a_file_that_cannot_be_opened_is_an_error_at_setup(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        log.setup(logfile=tmp_path / "gone" / "upq.log")


def test_without_a_file_lines_go_to_stderr(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    log.setup()
    logger.info("hello")
    assert capfd.readouterr().err.endswith(" INFO    hello\n")


def test_the_journal_gets_levels_and_no_times(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{info.st_dev}:{info.st_ino}")
    log.setup("debug")
    for level in (10, 20, 30, 40, 50):
        logger.log(level, "level %d", level)
    try:
        raise_in("x")
    except RuntimeError:
        logger.exception("our fault")
    lines = capfd.readouterr().err.splitlines()
    assert lines[:6] == [
        "<7>level 10",
        "<6>level 20",
        "<4>level 30",
        "<3>level 40",
        "<2>level 50",
        "<3>our fault",
    ]
    assert all(line.startswith("<3>    ") for line in lines[6:])


def test_another_streams_journal_is_not_ours(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    log.setup()
    logger.info("hello")
    assert "<6>" not in capfd.readouterr().err


def test_a_full_disk_is_told_once_and_kills_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    handler = log.setup(logfile=Path("/dev/full"))
    for _ in range(3):
        logger.info("lost")
    assert handler.lost == 3
    assert capfd.readouterr().err == (
        "upq: cannot write to /dev/full: [Errno 28] No space left on device\n"
    )


def test_a_second_outage_is_told_again(capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler = log.setup(fd=writer)
    for outage in (1, 2):
        while handler.lost < 2 * outage:
            logger.info("x" * 4000)
        assert capfd.readouterr().err.count("upq: cannot write to") == 1
        while os.read(reader, 1 << 16)[-1:] != b"\n":
            pass
        logger.info("works again")
    os.close(reader)
    os.close(writer)


def test_threads_do_not_break_each_others_lines() -> None:
    reader, writer = os.pipe()
    log.setup(logformat="%(message)s", fd=writer)

    def write(char: str) -> None:
        for _ in range(5):
            logger.info(char * 9000)

    threads = [threading.Thread(target=write, args=(char,)) for char in "abcd"]
    for thread in threads:
        thread.start()
    with open(reader) as lines:
        read = [next(lines) for _ in range(20)]
    for thread in threads:
        thread.join()
    os.close(writer)
    assert {len(set(line)) for line in read} == {2}


def test_lines_that_belong_together_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "upq.log"
    log.setup(logfile=file)
    written: list[bytes] = []
    write = os.write

    def noted(fd: int, data: bytes) -> int:
        written.append(data)
        return write(fd, data)

    monkeypatch.setattr(os, "write", noted)
    with log.together():
        for n in range(3):
            with log.job("test", n):
                logging.getLogger("upq.x").info("line %d", n)
        assert written == []
    assert len(written) == 1
    assert [line.split("INFO")[1].strip() for line in file.read_text().splitlines()] == [
        f"(test:{n}) line {n}" for n in range(3)
    ]
    logging.getLogger("upq.x").info("alone")
    assert len(written) == 2
