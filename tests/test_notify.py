"""Notifications: which ones an end calls for, and their way to real mail and syslog servers."""

from __future__ import annotations

import email
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope, LoginPassword
from sqlalchemy import create_engine

from tests.conftest import unavailable
from tests.jobkit import Ended, Jobs
from tests.servers import Missing, free_port, program
from upq.errors import BadParams
from upq.health import NO_JOB
from upq.job import CANCELLED, DONE, EXPIRED, FAILED, QUEUED, Job, NewJob, Outcome, Output
from upq.notify import (
    TAIL_BYTES,
    TEXT_LIMIT,
    Mail,
    Syslog,
    choose,
    describe,
    follow,
    parse_target,
)
from upq.secret import MASK, mask

AT = 1_800_000_000_000_000


def a_job(**facts: Any) -> Job:
    fields: dict[str, Any] = dict.fromkeys(Job._fields)
    fields |= {"id": 17, "type": "verify_local_file", "queue": "verify_local_file", "attempt": 3}
    fields |= {"params": {"fid": "50"}, "data": {"fid": "50"}, "submitter": "uid:1000"}
    return Job(**fields | {"created_at": AT, "started_at": AT + 1_000_000} | facts)


def told(outcome: Outcome, secret: set[str] | None = None, **facts: Any) -> dict[str, Any]:
    """What a notification says of the job."""
    found = follow(a_job(**facts), outcome, ["syslog"], frozenset(secret or ()), ended_at=AT)
    return dict(found[0].params["job"])


# Targets


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("mail:a@example.org", Mail(("a@example.org",))),
        ("mail:a@x,b.c+d@y.org", Mail(("a@x", "b.c+d@y.org"))),
        ("mail:root", Mail(("root",))),
        ("mail:me@[127.0.0.1]", Mail(("me@[127.0.0.1]",))),
        ("syslog", Syslog("daemon", "")),
        ("syslog:local3", Syslog("local3", "")),
        ("syslog:user.warning", Syslog("user", "warning")),
        ("syslog:.crit", Syslog("daemon", "crit")),
    ],
)
def test_targets_are_read(text: str, target: Mail | Syslog) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("mail", "mail: no mail address"),
        ("mail:,", "mail:,: no mail address"),
        ("mail:a b@x", "'a b@x' is not a mail address"),
        ("mail:a@x\r\nBcc: b@y", "is not a mail address"),
        ("mail:a@x\n", "is not a mail address"),
        ("mail:<a@x>", "'<a@x>' is not a mail address"),
        ("mail:a@b@c", "'a@b@c' is not a mail address"),
        ("syslog:demon.err", "no syslog facility 'demon', one of auth, "),
        ("syslog:daemon.bad", "no syslog level 'bad', one of alert, crit, "),
        ("pigeon:home", "neither mail:address[,address] nor syslog[:facility[.level]]"),
        ("", "neither mail:"),
    ],
)
def test_a_faulty_target_is_told(text: str, why: str) -> None:
    with pytest.raises(BadParams) as caught:
        parse_target(text)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("state", "asked", "targets"),
    [
        (DONE, [], ["good", "both"]),
        (FAILED, [], ["bad", "both"]),
        (EXPIRED, [], ["bad", "both"]),
        (CANCELLED, [], []),
        (QUEUED, [], []),
        (QUEUED, [False], ["bad", "both"]),
        (DONE, [False], ["bad", "both", "good"]),
        (DONE, [True], ["good", "both"]),
    ],
)
def test_an_end_chooses_its_targets(state: str, asked: list[bool], targets: list[str]) -> None:
    assert choose(state, ["good", "both"], ["bad", "both"], asked) == targets


# What follows an end


def test_each_target_gets_a_job_of_its_own() -> None:
    found = follow(a_job(), Outcome(FAILED), ["mail:a@x,b@y", "syslog", "syslog"])
    assert [(new.type, new.params["target"]) for new in found] == [
        ("notify", "mail:a@x,b@y"),
        ("notify", "syslog"),
    ]


def test_a_notification_calls_for_none() -> None:
    assert follow(a_job(type="notify"), Outcome(FAILED), ["syslog"]) == []


def test_a_notification_has_the_names_of_the_first_upq() -> None:
    outcome = Outcome(FAILED, "no good", {"a": 1}, data={"fid": "50", "more": "x"})
    found = follow(a_job(), outcome, ["syslog"], ended_at=AT, jobcfg={"path": "/x"})
    assert found[0].params["job"] == {
        "jobname": "verify_local_file",
        "jobid": 17,
        "params": {"fid": "50"},
        "jobdata": {"fid": "50", "more": "x"},
        "jobcfg": {"path": "/x"},
        "msgstr": "no good",
        "result": {"a": 1},
        "retries": 2,
        "state": "failed",
        "queue": "verify_local_file",
        "submitter": "uid:1000",
        "created_at": AT,
        "started_at": AT + 1_000_000,
        "ended_at": AT,
        "output": "",
    }


def test_mask_reaches_into_what_is_nested() -> None:
    value = {"a": 1, "b": [{"pw": "x", "c": {"pw": ["y"]}}], "pw": None}
    masked = {"a": 1, "b": [{"pw": MASK, "c": {"pw": MASK}}], "pw": MASK}
    assert mask(value, frozenset({"pw"})) == masked
    assert mask(value, frozenset()) is value


def test_a_secret_is_nowhere_in_a_notification() -> None:
    output = Output("login with hunter2 and opensesame", 33, False)
    outcome = Outcome(FAILED, "no: hunter2", {"pw": "hunter2"}, {"pw": "opensesame"}, output=output)
    params = {"pw": "hunter2", "user": "me"}
    jobcfg = {"password": "hunter2", "api_key": "hunter2", "smtp_token": "hunter2", "keep": "7d"}
    found = follow(a_job(params=params), outcome, ["syslog"], frozenset({"pw"}), jobcfg=jobcfg)
    text = json.dumps(found[0].params)
    assert "hunter2" not in text
    assert "opensesame" not in text
    assert found[0].params["job"]["jobcfg"]["keep"] == "7d"


def test_a_short_secret_does_not_spoil_the_text() -> None:
    assert told(Outcome(FAILED, "1 of 10"), {"pin"}, params={"pin": "1"})["msgstr"] == "1 of 10"


def test_a_notification_stays_small() -> None:
    big = "ä" * 1_000_000
    outcome = Outcome(FAILED, big, [big], {"x": big}, output=Output(big, 2_000_000, True))
    job = told(outcome)
    assert len(job["msgstr"]) == TEXT_LIMIT
    assert set(job["result"]) == set(job["jobdata"]) == {"left_out"}
    assert len(job["output"].encode()) <= TAIL_BYTES
    assert job["output"].strip("ä") == ""


# Mail


class Postbox:
    """Keeps what a mail server was given, and answers as it is told."""

    def __init__(self) -> None:
        self.mails: list[Envelope] = []
        self.logins: list[tuple[bytes, bytes]] = []
        #: What RCPT of an address, or DATA, is answered; else 250.
        self.replies: dict[str, str] = {}

    async def handle_RCPT(
        self, server: Any, session: Any, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        answer = self.replies.get(address, "250 OK")
        if answer.startswith("2"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, server: Any, session: Any, envelope: Envelope) -> str:
        if "DATA" not in self.replies:
            self.mails.append(envelope)
        return self.replies.get("DATA", "250 OK")

    def login(self, server: Any, session: Any, envelope: Any, how: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        self.logins.append((data.login, data.password))
        return AuthResult(success=data.password == b"right", handled=False)

    @property
    def recipients(self) -> list[list[str]]:
        return [mail.rcpt_tos for mail in self.mails]

    def message(self, number: int = 0) -> EmailMessage:
        content = self.mails[number].content
        assert isinstance(content, bytes)
        message = email.message_from_bytes(content, policy=default)
        assert isinstance(message, EmailMessage)
        return message

    def body(self, number: int = 0) -> str:
        return str(self.message(number).get_content()).replace("\r\n", "\n")


@pytest.fixture
def postbox() -> Postbox:
    return Postbox()


Start = Callable[..., Controller]


@pytest.fixture
def mail_server(postbox: Postbox) -> Iterator[Start]:
    """Starts SMTP servers: `mail_server(**settings of aiosmtpd)`."""
    started = []

    def start(port: int = 0, **settings: Any) -> Controller:
        controller = Controller(postbox, hostname="127.0.0.1", port=port or free_port(), **settings)
        controller.start()
        started.append(controller)
        return controller

    yield start
    for controller in started:
        controller.stop()


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A TLS context for 127.0.0.1 that this process trusts."""
    import ssl

    try:
        openssl = program("openssl", "openssl")
    except Missing as missing:
        unavailable(str(missing))
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(create_engine(f"sqlite:///{tmp_path}/jobs.db"))


FAILURE = Outcome(FAILED, "Hashes of file (50) /x do not match those in DB: sha1")


def notification(target: str, outcome: Outcome = FAILURE, **facts: Any) -> NewJob:
    return follow(a_job(**facts), outcome, [target], ended_at=AT + 2_500_000)[0]


def at(server: Controller, **more: str) -> dict[str, str]:
    return {"mail_server": f"127.0.0.1:{server.port}", "mail_from": "upq@example.org", **more}


def send(jobs: Jobs, target: str, jobcfg: dict[str, str], outcome: Outcome = FAILURE) -> Ended:
    return jobs.run("notify", notification(target, outcome).params, jobid=18, **jobcfg)


def test_a_mail_tells_of_a_failure(jobs: Jobs, mail_server: Start, postbox: Postbox) -> None:
    outcome = Outcome(FAILED, "no good\nat all", output=Output("first\nlast\n", 11, False))
    ended = send(jobs, "mail:a@x.org,b@y.org", at(mail_server()), outcome)
    assert (ended.state, ended.message) == ("done", "sent to a@x.org, b@y.org")
    assert postbox.recipients == [["a@x.org", "b@y.org"]]
    message, host = postbox.message(), socket.gethostname()
    assert message["Subject"] == (rf"[upq] verify_local_file 17 failed on {host}: no good\nat all")
    assert message["From"] == "upq@example.org"
    assert message["To"] == "a@x.org, b@y.org"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["Message-ID"] == f"<upq.17.18.{AT + 2_500_000}@{host}>"
    assert message["Date"].datetime.timestamp() == pytest.approx(time.time(), abs=60)
    assert postbox.body() == (
        f"Job 17 verify_local_file failed on {host}\n"
        "\n"
        "no good\n"
        "at all\n"
        "\n"
        'params:     {"fid": "50"}\n'
        "result:     null\n"
        "queue:      verify_local_file\n"
        "submitter:  uid:1000\n"
        "attempts:   3\n"
        "created:    2027-01-15T08:00:00.000000Z\n"
        "started:    2027-01-15T08:00:01.000000Z\n"
        "ended:      2027-01-15T08:00:02.500000Z\n"
        "\n"
        "The end of its output:\n"
        "first\n"
        "last\n"
        "\n"
        "Try it again:   upq-cli retry 17\n"
        "All about it:   upq-cli show 17\n"
    )


def test_a_mail_tells_of_success(jobs: Jobs, mail_server: Start, postbox: Postbox) -> None:
    send(jobs, "mail:a@x.org", at(mail_server()), Outcome(DONE))
    host = socket.gethostname()
    assert postbox.message()["Subject"] == f"[upq] verify_local_file 17 done on {host}"
    assert "retry" not in postbox.body()


def test_from_of_the_notify_section_wins(jobs: Jobs, mail_server: Start, postbox: Postbox) -> None:
    jobcfg = at(mail_server()) | {"from": "Die Jobs <root@localhost>"}
    assert send(jobs, "mail:a@x.org", jobcfg).state == "done"
    assert postbox.message()["From"] == "Die Jobs <root@localhost>"
    assert postbox.mails[0].mail_from == "root@localhost"


def test_mail_goes_out_encrypted_and_after_a_login(
    jobs: Jobs, mail_server: Start, postbox: Postbox, certificate: Any
) -> None:
    server = mail_server(
        tls_context=certificate, require_starttls=True, auth_required=True,
        authenticator=postbox.login,
    )  # fmt: skip
    jobcfg = at(server, mail_tls="starttls", mail_user="me", mail_password="right")
    assert send(jobs, "mail:a@x.org", jobcfg).state == "done"
    assert postbox.logins == [(b"me", b"right")]
    assert postbox.recipients == [["a@x.org"]]


def test_mail_goes_out_by_tls_from_the_start(
    jobs: Jobs, mail_server: Start, postbox: Postbox, certificate: Any
) -> None:
    server = mail_server(ssl_context=certificate)
    assert send(jobs, "mail:a@x.org", at(server, mail_tls="tls")).state == "done"
    assert postbox.recipients == [["a@x.org"]]


@pytest.mark.parametrize("tls", ["starttls", "tls"])
def test_mail_never_goes_to_a_server_with_a_wrong_certificate(
    jobs: Jobs,
    mail_server: Start,
    postbox: Postbox,
    certificate: Any,
    *,
    monkeypatch: pytest.MonkeyPatch,
    tls: str,
) -> None:
    setting = "ssl_context" if tls == "tls" else "tls_context"
    server = mail_server(**{setting: certificate})
    monkeypatch.delenv("SSL_CERT_FILE")
    ended = send(jobs, "mail:a@x.org", at(server, mail_tls=tls))
    assert ended.state == "retry"
    assert "certificate verify failed" in ended.message
    assert postbox.mails == []


def test_mail_never_goes_out_in_the_clear_when_it_must_not(
    jobs: Jobs, mail_server: Start, postbox: Postbox
) -> None:
    ended = send(jobs, "mail:a@x.org", at(mail_server(), mail_tls="starttls"))
    assert ended.state == "abort"
    assert "STARTTLS extension not supported" in ended.message
    assert postbox.mails == []


@pytest.mark.filterwarnings("ignore:Requiring AUTH")
def test_a_wrong_password_fails_for_good_and_is_not_told(
    jobs: Jobs, mail_server: Start, postbox: Postbox
) -> None:
    server = mail_server(auth_required=True, auth_require_tls=False, authenticator=postbox.login)
    ended = send(jobs, "mail:a@x.org", at(server, mail_user="me", mail_password="wr0ng"))
    assert ended.state == "abort"
    assert ended.message.startswith("mail server: 535 ")
    assert "wr0ng" not in ended.message


def test_mail_waits_for_a_server_that_is_down(
    jobs: Jobs, mail_server: Start, postbox: Postbox
) -> None:
    port = free_port()
    new = notification("mail:a@x.org")
    jobcfg = {"mail_server": f"127.0.0.1:{port}", "mail_from": "upq@example.org"}
    ended = jobs.run("notify", new.params, **jobcfg)
    assert ended.state == "retry"
    assert "Connection refused" in ended.message
    mail_server(port)
    assert jobs.run("notify", ended.data, **jobcfg).state == "done"
    assert postbox.recipients == [["a@x.org"]]


def test_mail_does_not_wait_for_ever_for_a_silent_server(jobs: Jobs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = f"127.0.0.1:{silent.getsockname()[1]}"
        ended = send(jobs, "mail:a@x.org", {"mail_server": server, "mail_timeout_s": "0.1"})
    assert ended.state == "retry"
    assert "timed out" in ended.message


@pytest.mark.parametrize(
    ("reply", "state"), [("451 later", "retry"), ("554 no\r\n", "abort"), ("552 full", "abort")]
)
def test_the_server_says_whether_it_is_tried_again(
    jobs: Jobs, mail_server: Start, postbox: Postbox, reply: str, state: str
) -> None:
    postbox.replies["DATA"] = reply
    ended = send(jobs, "mail:a@x.org", at(mail_server()))
    assert ended.state == state
    assert ended.message == f"mail server: {reply.strip()}"


def test_who_is_refused_for_now_is_tried_again_and_nobody_else(
    jobs: Jobs, mail_server: Start, postbox: Postbox
) -> None:
    postbox.replies = {"b@x": "450 busy", "c@x": "550 unknown"}
    server = mail_server()
    first = send(jobs, "mail:a@x,b@x,c@x", at(server))
    assert first.state == "retry"
    assert first.message == "sent to a@x; c@x refused: 550 unknown; b@x refused: 450 busy"
    assert first.data["target"] == "mail:b@x"
    del postbox.replies["b@x"]
    second = jobs.run("notify", first.data, **at(server))
    # The end still tells of the one that never got it.
    assert (second.state, second.message) == ("abort", "sent to b@x; c@x refused: 550 unknown")
    assert postbox.recipients == [["a@x"], ["b@x"]]


def test_when_all_are_refused_it_is_for_good_or_for_now(
    jobs: Jobs, mail_server: Start, postbox: Postbox
) -> None:
    server = mail_server()
    postbox.replies = {"a@x": "550 unknown", "b@x": "553 no"}
    ended = send(jobs, "mail:a@x,b@x", at(server))
    assert ended.state == "abort"
    assert ended.message == "a@x refused: 550 unknown; b@x refused: 553 no"
    postbox.replies = {"a@x": "421 closing"}
    ended = send(jobs, "mail:a@x,b@x", at(server))
    assert ended.state == "retry"
    assert ended.data["target"] == "mail:a@x,b@x"


def test_notify_takes_no_job_of_a_client(jobs: Jobs) -> None:
    params = notification("mail:victim@example.org").params
    assert jobs.submit("notify", params) == "notify is queued by the daemon itself"
    assert jobs.submit("notify", {"mail": "x@y"}) == "notify is queued by the daemon itself"


# Lines that would be more than one (T28)

BREAKS = [
    "\r\n",
    "\n",
    "\r",
    "\n\n",
    "\r\n\r\n",
    "\0",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u2028",
    "\u2029",
]
INJECTED = ["Bcc: victim@example.org", ".", "RCPT TO:<victim@example.org>", "<0>kernel: panic"]
PAYLOADS = [f"x{end}{text}" for end in BREAKS for text in INJECTED] + [
    "\udc80\r\nTo: v@x",
    "\r\n.\r\n",
]


def poisoned(payload: str) -> Outcome:
    return Outcome(
        FAILED, payload, {"r": payload}, {payload: payload}, output=Output(payload, 9, False)
    )


def test_no_field_of_a_job_adds_a_header_or_a_recipient(
    jobs: Jobs, mail_server: Start, postbox: Postbox
) -> None:
    jobcfg = at(mail_server())
    for number, payload in enumerate(PAYLOADS):
        outcome = poisoned(payload)
        facts = dict.fromkeys(("type", "queue", "submitter"), payload)
        params = notification("mail:a@x.org", outcome, **facts).params
        assert jobs.run("notify", params, **jobcfg).state == "done"
        assert postbox.mails[number].rcpt_tos == ["a@x.org"]
        message = postbox.message(number)
        assert set(message.keys()) == {
            *("Subject", "From", "To", "Date", "Message-ID", "Auto-Submitted"),
            *("Content-Type", "Content-Transfer-Encoding", "MIME-Version"),
        }
        assert message["To"] == "a@x.org"
        assert "All about it:" in postbox.body(number)
    assert len(postbox.mails) == len(PAYLOADS)


def test_the_payloads_are_at_least_fifty() -> None:
    assert len(PAYLOADS) >= 50


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_field_of_a_job_adds_a_line_to_the_log(
    jobs: Jobs, dev_log: socket.socket, payload: str
) -> None:
    new = notification("syslog", poisoned(payload), type=payload)
    assert jobs.run("notify", new.params, **log_to(dev_log)).state == "done"
    line = dev_log.recv(65536).decode()
    assert line.startswith(f"<27>upq[{os.getpid()}]: job 17 ")
    assert line.isprintable()


# Syslog


@pytest.fixture
def dev_log(short_tmp: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(short_tmp / "log"))
        receiver.settimeout(5)
        yield receiver


def log_to(receiver: socket.socket) -> dict[str, str]:
    return {"syslog_address": receiver.getsockname()}


@pytest.mark.parametrize(
    ("target", "outcome", "priority"),
    [
        ("syslog", FAILURE, 3 * 8 + 3),
        ("syslog", Outcome(DONE), 3 * 8 + 6),
        ("syslog:local7", FAILURE, 23 * 8 + 3),
        ("syslog:user.debug", FAILURE, 1 * 8 + 7),
        ("syslog:mail.crit", Outcome(DONE), 2 * 8 + 2),
    ],
)
def test_syslog_honours_facility_and_level(
    jobs: Jobs, dev_log: socket.socket, target: str, outcome: Outcome, priority: int
) -> None:
    assert send(jobs, target, log_to(dev_log), outcome).state == "done"
    said = f"job 17 verify_local_file {outcome.state}: {outcome.message}"
    assert dev_log.recv(65536).decode() == f"<{priority}>upq[{os.getpid()}]: {said}"


def test_a_syslog_line_is_cut_between_two_characters(jobs: Jobs, dev_log: socket.socket) -> None:
    send(jobs, "syslog", log_to(dev_log), Outcome(FAILED, "x" + "\N{PILE OF POO}" * 5_000))
    line = dev_log.recv(65536)
    assert 850 < len(line) < 1024
    assert line.decode().endswith("\N{PILE OF POO}")


def test_syslog_waits_for_a_daemon_that_is_down(jobs: Jobs, short_tmp: Path) -> None:
    path = short_tmp / "log"
    params = notification("syslog").params
    assert jobs.run("notify", params, syslog_address=str(path)).state == "retry"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        assert jobs.run("notify", params, syslog_address=str(path)).state == "done"
        assert b"job 17" in receiver.recv(65536)
    # The socket file is still there, and nobody listens.
    ended = jobs.run("notify", params, syslog_address=str(path))
    assert (ended.state, "Connection refused" in ended.message) == ("retry", True)


@pytest.mark.parametrize("scheme", ["", "udp://"])
def test_syslog_goes_to_another_machine_by_udp(jobs: Jobs, scheme: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        address = f"{scheme}127.0.0.1:{receiver.getsockname()[1]}"
        assert send(jobs, "syslog", {"syslog_address": address}).state == "done"
        line = receiver.recv(65536).decode()
    priority, stamp, host, name, pid, msgid, data, text = line.split(" ", 7)
    assert (priority, host, name) == ("<27>1", socket.gethostname(), "upq")
    assert (pid, msgid, data) == (str(os.getpid()), "-", "-")
    assert stamp.endswith("Z")
    assert text.startswith("job 17 verify_local_file failed: Hashes of file (50) ")


def test_syslog_goes_to_another_machine_by_tcp(jobs: Jobs) -> None:
    received: list[bytes] = []

    def receive(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as file:
            received.append(file.read())

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=receive, args=(server,))
        thread.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        ended = send(jobs, "syslog", {"syslog_address": address})
        thread.join(5)
    assert ended.message == f"sent to syslog {address}"
    assert received[0].startswith(b"<27>1 ")
    assert received[0].count(b"\n") == 1
    assert send(jobs, "syslog", {"syslog_address": address}).state == "retry"


def test_a_real_rsyslog_files_each_notification_under_its_priority(
    jobs: Jobs, short_tmp: Path
) -> None:
    try:
        rsyslogd = program("rsyslogd", "rsyslog")
    except Missing as missing:
        unavailable(str(missing))
    port, written = free_port(), short_tmp / "messages"
    configuration = short_tmp / "rsyslog.conf"
    text = "%msg:::sp-if-no-1st-sp%%msg%"  # the old format has the blank in the text
    configuration.write_text(
        f"""
        module(load="imuxsock" SysSock.Use="off")
        input(type="imuxsock" Socket="{short_tmp}/log")
        module(load="imtcp")
        input(type="imtcp" address="127.0.0.1" port="{port}")
        template(name="line" type="string"
            string="%syslogfacility-text%.%syslogseverity-text% %programname%:{text}\\n")
        *.* action(type="omfile" file="{written}" template="line")
        """
    )
    server = subprocess.Popen(
        [rsyslogd, "-n", "-f", str(configuration), "-i", str(short_tmp / "pid")],
        stdin=subprocess.DEVNULL,
    )
    try:
        for target, address in (
            ("syslog", f"{short_tmp}/log"),
            ("syslog:local3.warning", f"{short_tmp}/log"),
            ("syslog:user.notice", f"tcp://127.0.0.1:{port}"),
        ):
            jobcfg = {"syslog_address": address}
            wait_for(lambda t=target, c=jobcfg: send(jobs, t, c).state == "done")  # type: ignore[misc]
        expected = "job 17 verify_local_file failed: " + FAILURE.message
        lines = {f"{p} upq: {expected}" for p in ("daemon.err", "local3.warning", "user.notice")}
        wait_for(lambda: written.exists() and set(written.read_text().splitlines()) >= lines)
        assert len(written.read_text().splitlines()) == len(lines)
    finally:
        server.terminate()
        server.wait(10)


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Groups of failures, and alerts


def of_group(event: str, **more: Any) -> dict[str, Any]:
    """What `upq.health` says of a group, as the notify job gets it."""
    told = {**NO_JOB, "jobname": "hash", "jobid": 19, "msgstr": "no disk", "ended_at": AT}
    told |= {"event": event, "news": f"news of {event}", "thread": f"17.{AT}", "ids": [17, 19]}
    return told | {"first_at": AT, "last_at": AT + 1_000_000} | more


def test_mails_of_a_group_are_one_talk(jobs: Jobs, mail_server: Start, postbox: Postbox) -> None:
    jobcfg = at(mail_server())
    for number, event in enumerate(("failed", "digest", "recovered"), 20):
        facts = {**describe(a_job(), FAILURE, ended_at=AT), **of_group(event, created_at=AT)}
        params = {"target": "mail:a@x.org", "job": facts}
        assert jobs.run("notify", params, jobid=number, **jobcfg).state == "done"
    mails = [postbox.message(number) for number in range(3)]
    for mail, event in zip(mails, ("failed", "digest", "recovered"), strict=True):
        assert mail["References"] == mail["In-Reply-To"] == f"<17.{AT}.thread@upq>"
        assert mail["Subject"] == f"[upq] hash: news of {event}: no disk"
    assert len({mail["Message-ID"] for mail in mails}) == 3
    digest = postbox.body(1)
    assert "The latest are 17, 19; the last said:\n\nno disk\n" in digest
    assert "The first failed at 2027-01-15T08:00:00.000000Z, the last at 2027-" in digest
    assert "upq-cli retry 19" in digest


def test_a_mail_of_no_group_belongs_to_no_talk(
    jobs: Jobs, mail_server: Start, postbox: Postbox
) -> None:
    send(jobs, "mail:a@x.org", at(mail_server()))
    assert "References" not in postbox.message()


def test_an_alert_tells_of_no_job(jobs: Jobs, mail_server: Start, postbox: Postbox) -> None:
    told = {**NO_JOB, "jobname": "hash", "event": "alert", "news": "too old", "thread": "hash.1"}
    jobs.run("notify", {"target": "mail:a@x.org", "job": told}, jobid=5, **at(mail_server()))
    assert postbox.message()["Subject"] == "[upq] hash: too old"
    assert postbox.body().startswith(f"hash: too old, on {socket.gethostname()}\n\nAll that waits:")
    assert "show 0" not in postbox.body()


@pytest.mark.parametrize(("state", "level"), [(FAILED, 3), (DONE, 6)])
def test_syslog_tells_of_a_group(
    jobs: Jobs, dev_log: socket.socket, state: str, level: int
) -> None:
    params = {"target": "syslog", "job": of_group("digest", state=state)}
    assert jobs.run("notify", params, jobid=5, **log_to(dev_log)).state == "done"
    line = dev_log.recv(4096).decode()
    assert line.startswith(f"<{3 * 8 + level}>")
    assert line.endswith(": hash: news of digest: no disk")
