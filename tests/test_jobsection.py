"""`[job <type>]` of upq.cfg: what is read from it, and what it finds in files that it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import test_config
from upq.jobsettings import JobSettings
from upq.params import Param, ParamSpec
from upq.settings import Settings

write, load = test_config.write, test_config.load


@pytest.fixture
def job(load: Callable[..., Settings]) -> Callable[..., JobSettings]:
    """The type `a` with these lines in its section."""
    return lambda lines="": load(f"[job a]\n{lines}\n[job notify]\n").jobs["a"]


def test_a_section_without_a_line_has_the_defaults(job: Callable[..., JobSettings]) -> None:
    settings = job()
    assert settings == JobSettings("a", "upq.cfg", 1, missing=True)
    assert (settings.enabled, settings.concurrent, settings.success_codes) == (True, 1, (0,))
    assert settings.output_limit_bytes == 1 << 20


def test_every_setting_of_a_job_is_read(job: Callable[..., JobSettings], tmp_path: Path) -> None:
    settings = job(
        """
        enabled: off
        concurrent = 3
        timeout = 1h30m
        retries = 5
        retry_delay = 2s
        retry_backoff = 1.5
        retry_max = 1d
        secret = pin
        params = path:path pin size:int=1
        command = resize --pin={pin}
            {path} {size}
        success_codes = 0, 2
        retry_codes = 75
        abort_codes = 64,65
        result = json
        progress_fd = 3
        stdin = a {{pin}}: {pin}
        env = LANG=C  GREETING="two words" TZ PIN={pin}
        cwd = work/{pin}
        nice = 10
        ionice = best-effort:7
        memory_limit = 1G
        cpu_limit = 1m
        file_limit = 512K
        open_files = 64
        memory_max = 256M
        cpu_quota = 150%
        tasks_max = 32
        priority = high
        submit = root, @root
        output_limit = 64K
        my own = 100%
        """
    )
    assert settings == JobSettings(
        name="a",
        file="upq.cfg",
        line=1,
        enabled=False,
        concurrent=3,
        timeout_s=5400,
        retries=5,
        retry_delay_s=2,
        retry_backoff=1.5,
        retry_max_s=86400,
        secret=frozenset({"pin"}),
        params=ParamSpec((Param("path", "path"), Param("pin"), Param("size", "int", (), False, 1))),
        command=("resize", "--pin={pin}", "{path}", "{size}"),
        success_codes=(0, 2),
        retry_codes=(75,),
        abort_codes=(64, 65),
        result="json",
        progress_fd=3,
        stdin="a {{pin}}: {pin}",
        env={"LANG": "C", "GREETING": "two words", "TZ": None, "PIN": "{pin}"},
        cwd=f"{tmp_path}/work/{{pin}}",
        nice=10,
        ionice="best-effort:7",
        memory_limit_bytes=1 << 30,
        cpu_limit_s=60,
        file_limit_bytes=512 << 10,
        open_files=64,
        memory_max_bytes=256 << 20,
        cpu_quota=1.5,
        tasks_max=32,
        priority=10,
        submit=("root", "@root"),
        output_limit_bytes=65536,
        variables=settings.variables,
    )
    assert settings.variables["my own"] == "100%"
    assert settings.variables["concurrent"] == "3"


def test_a_command_without_params_takes_the_text_of_its_placeholders(
    job: Callable[..., JobSettings],
) -> None:
    assert job("command = cp {a} {b} {a}").params == ParamSpec((Param("a"), Param("b")))
    assert job("command = true").params == ParamSpec()
    settings = job("command = cp {a}\nstdin = {b} {a}\ncwd = {c}\nenv = X={d}")
    assert settings.params == ParamSpec((Param("a"), Param("b"), Param("d"), Param("c", "path")))
    assert settings.cwd == "{c}"
    assert job("").params is None


def test_an_empty_value_means_the_default(job: Callable[..., JobSettings]) -> None:
    settings = job("concurrent =\nnotify_success =\ntimeout =")
    assert (settings.concurrent, settings.notify_success, settings.timeout_s) == (1, (), 0)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("syslog", ("syslog",)),
        ("syslog:local0.err", ("syslog:local0.err",)),
        ("syslog local0.err", ("syslog:local0.err",)),
        ("syslog daemon mail a@x", ("syslog:daemon", "mail:a@x")),
        ("mail:a@x,b@y syslog", ("mail:a@x,b@y", "syslog")),
        ("mail:a@x, b@y, syslog", ("mail:a@x,b@y", "syslog")),
        ("mail a@x b@y", ("mail:a@x,b@y",)),
        ("mail: a@x", ("mail:a@x",)),
        ("mail root", ("mail:root",)),
        ("mail a@x mail b@y", ("mail:a@x", "mail:b@y")),
        ("mail a@x\n syslog", ("mail:a@x", "syslog")),
        ("mail a@x, ntfy://h/a,b, syslog", ("mail:a@x", "ntfy://h/a,b", "syslog")),
        ("mail:a@x,ntfy://h/a", ("mail:a@x", "ntfy://h/a")),
        ("webhook:https://h/p?a=1,2", ("webhook:https://h/p?a=1,2",)),
    ],
)
def test_targets_are_read_in_both_spellings(
    job: Callable[..., JobSettings], text: str, targets: tuple[str, ...]
) -> None:
    settings = job(f"notify_fail = {text}\nnotify_success = {text}")
    assert settings.notify_fail == settings.notify_success == targets


def test_retry_words_are_retries_and_what_is_said_outright_wins(
    job: Callable[..., JobSettings],
) -> None:
    settings = job("notify_fail = retrywait:3|1h mail:a@x\nretries = 5")
    assert settings.notify_fail == ("mail:a@x",)
    assert settings.retries == 5
    assert (settings.retry_delay_s, settings.retry_backoff) == (3600, 1)


# Secrets of its own


def test_a_job_finds_its_own_secret_from_a_file(
    load: Callable[..., Settings], write: Callable[..., None]
) -> None:
    write("hunter2\n", "secret")
    settings = load(
        "[job a]\ncommand = true\n"
        "eu_password_file = secret\nkey_file = secret\nsecret_file = secret"
    )
    assert settings.jobs["a"].variables["eu_password"] == "hunter2"
    assert settings.jobs["a"].variables["eu_password_file"] == "secret"
    assert not {"key", "secret"} & settings.jobs["a"].variables.keys()
    assert settings.jobs["a"].secret == frozenset()
    assert "hunter2" not in repr(settings.jobs["a"])


def test_a_secret_that_stands_in_the_section_wins_over_a_file(
    load: Callable[..., Settings], write: Callable[..., None]
) -> None:
    write("from the file", "secret")
    own = load("[job a]\ncommand = true\ntoken_file = secret\ntoken = mine").jobs["a"]
    assert own.variables["token"] == "mine"


def test_a_job_may_mean_something_else_by_a_name_that_sounds_so(
    load: Callable[..., Settings],
) -> None:
    settings = load("[job a]\ncommand = true\npassword_file = not/made/yet")
    assert settings.warnings == (
        "upq.cfg:3: password_file: not/made/yet: No such file or directory",
    )
    assert "password" not in settings.jobs["a"].variables
