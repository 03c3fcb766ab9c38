"""Webhooks and the services of apprise: real servers, and what must not be reached."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

from tests.daemons import Daemon, until
from tests.jobkit import JOBS_DIR, Ended, Jobs
from upq import webhook
from upq.errors import BadParams
from upq.job import DONE, FAILED, Job, Outcome
from upq.notify import (
    Service,
    Webhook,
    address,
    describe,
    follow,
    is_allowed,
    parse_target,
    shown_target,
    split_targets,
)

AT = 1_800_000_000_000_000
LOCAL = (ipaddress.ip_network("127.0.0.1"),)


class Receiver:
    """An HTTP server on this machine that keeps what it is sent, and answers as it is told."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body = b"thanks"
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.asked.append((self.command, self.path, dict(self.headers), content))
                self.send_response(receiver.status)
                for name, text in receiver.headers.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(receiver.body)))
                self.end_headers()
                self.wfile.write(receiver.body)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(create_engine(f"sqlite:///{tmp_path}/jobs.db"))


def a_job(**facts: Any) -> Job:
    fields: dict[str, Any] = dict.fromkeys(Job._fields)
    fields |= {"id": 17, "type": "hash", "queue": "hash", "attempt": 3, "params": {}, "data": {}}
    return Job(**fields | {"submitter": "me", "created_at": AT, "started_at": AT} | facts)


def send(jobs: Jobs, target: str, state: str = FAILED, **jobcfg: str) -> Ended:
    new = follow(a_job(), Outcome(state, "no good"), [target], ended_at=AT)[0]
    return jobs.run("notify", new.params, jobid=18, **{"webhook_allow": "127.0.0.1", **jobcfg})


# Targets


@pytest.mark.parametrize(
    ("text", "target", "shown"),
    [
        ("ntfy://host/topic", Service("ntfy://host/topic"), "ntfy://***"),
        ("discord://id/token", Service("discord://id/token"), "discord://***"),
        ("syslog://", None, ""),
        ("webhook:https://h/p?t=1", Webhook("https://h/p?t=1"), "webhook:https://h/***"),
        ("webhook:http://h:8080", Webhook("http://h:8080"), "webhook:http://h:8080"),
        ("webhook:http://h?t=1", Webhook("http://h?t=1"), "webhook:http://h/***"),
        ("webhook:http://[::1]:80/", Webhook("http://[::1]:80/"), "webhook:http://[::1]:80/"),
    ],
)
def test_targets_that_are_urls_are_read_and_shown(text: str, target: Any, shown: str) -> None:
    if target is None:
        with pytest.raises(BadParams):
            parse_target(text)
    else:
        assert parse_target(text) == target
        assert shown_target(text) == shown


@pytest.mark.parametrize(
    "url",
    [
        *(
            "ftp://h/hidden",
            "https://u:hidden@h/",
            "https://hidden@h/",
            "https:///hidden",
            "",
        ),
        *(
            "https://h/hidden#f",
            "https://hidden\\@h/",
            "https://h/hidden\r\nX: y",
            "file:///hidden",
        ),
        *("https://h:0/hidden", "https://h:99999/hidden", "https://[::1/hidden", "gopher://h/"),
        *("https://h /hidden", "https://hä/hidden", "HTTP://h/hidden x", "https://h/\0hidden"),
    ],
)
def test_a_faulty_webhook_is_told_without_its_secrets(url: str) -> None:
    with pytest.raises(BadParams) as caught:
        parse_target(f"webhook:{url}")
    assert "hidden" not in str(caught.value)


def test_urls_end_at_blanks_and_all_else_at_commas() -> None:
    text = "mail:a@x,b@y, syslog discord://a,b,c x,ntfy://h/t, webhook:https://h/p?a=1,2, mail"
    assert split_targets(text) == [
        *("mail:a@x", "b@y", "syslog", "discord://a,b,c", "x", "ntfy://h/t"),
        *("webhook:https://h/p?a=1,2", "mail"),
    ]


def test_a_url_is_stored_beside_what_is_shown_of_it() -> None:
    targets = ["syslog", "discord://id/token", "webhook:https://h/"]
    assert [new.params for new in address({}, targets)] == [
        {"target": "syslog", "job": {}},
        {"target": "discord://***", "target_url": "discord://id/token", "job": {}},
        {"target": "webhook:https://h/", "job": {}},
    ]


def test_the_section_that_is_told_has_no_url_of_a_target() -> None:
    jobcfg = {"notify_fail": "discord://id/token", "notify_success": "syslog", "notify_after": "3"}
    told = describe(a_job(), Outcome(FAILED), jobcfg=jobcfg)
    assert told["jobcfg"] == {**jobcfg, "notify_fail": "***"}


@pytest.mark.parametrize(
    ("target", "pattern", "is_so"),
    [
        ("mail:a@example.org", "mail:*@example.org", True),
        ("mail:a@example.org,b@example.org", "mail:*@example.org", True),
        ("mail:a@evil.org,b@example.org", "mail:*@example.org", False),
        ("mail:a@example.org.evil.org", "mail:*@example.org", False),
        ("mail:a@examplexorg", "mail:*@example.org", False),
        ("mail:a@x", "*", True),
        ("mail:a@x", "mail:*", False),
        ("syslog", "syslog", True),
        ("syslog:auth.emerg", "syslog", False),
        ("syslog:auth.emerg", "syslog:*", True),
        ("webhook:https://h.example.org/a/b?c@d", "webhook:https://*.example.org/*", True),
        ("webhook:https://evil.org/x.example.org/", "webhook:https://*.example.org/*", False),
        ("webhook:https://evil.org?x.example.org/", "webhook:https://*.example.org/*", False),
        ("webhook:http://h.example.org/", "webhook:https://*.example.org/*", False),
        ("ntfy://evil@h/t", "ntfy://*/t", False),
        ("ntfy://h/t", "ntfy://*/t", True),
    ],
)
def test_a_pattern_admits_what_it_says_and_nothing_beside(
    target: str, pattern: str, is_so: bool
) -> None:
    assert is_allowed(target, [pattern]) is is_so
    assert not is_allowed(target, [])


# A webhook


def test_a_webhook_is_a_post_of_the_job_signed(jobs: Jobs, receiver: Receiver) -> None:
    target = f"webhook:http://127.0.0.1:{receiver.port}/hook/hidden?a=1"
    ended = send(jobs, target, webhook_secret="s3cret")
    shown = f"webhook:http://127.0.0.1:{receiver.port}/***"
    assert (ended.state, ended.message) == ("done", f"sent to {shown}")
    ((verb, path, headers, body),) = receiver.asked
    assert (verb, path) == ("POST", "/hook/hidden?a=1")
    assert headers["Host"] == f"127.0.0.1:{receiver.port}"
    assert json.loads(body) == describe(a_job(), Outcome(FAILED, "no good"), ended_at=AT)
    assert headers["Content-Type"] == "application/json"
    assert (headers["X-Upq-Event"], headers["X-Upq-Delivery"]) == ("failed", "18")
    assert abs(int(headers["X-Upq-Timestamp"]) - time.time()) < 60
    signed = headers["X-Upq-Timestamp"].encode() + b"." + body
    expected = hmac.new(b"s3cret", signed, hashlib.sha256).hexdigest()
    assert headers["X-Upq-Signature"] == f"sha256={expected}"


def test_without_a_secret_there_is_no_signature(jobs: Jobs, receiver: Receiver) -> None:
    send(jobs, f"webhook:http://127.0.0.1:{receiver.port}/", DONE)
    assert "X-Upq-Signature" not in receiver.asked[0][2]
    assert receiver.asked[0][2]["X-Upq-Event"] == "done"


@pytest.mark.parametrize(
    ("status", "state"),
    [
        *((200, "done"), (204, "done"), (301, "retry"), (302, "retry"), (307, "retry")),
        *((400, "abort"), (404, "abort"), (410, "abort"), (408, "retry"), (425, "retry")),
        *((429, "retry"), (500, "retry"), (503, "retry")),
    ],
)
def test_the_status_says_whether_it_is_tried_again(
    jobs: Jobs, receiver: Receiver, status: int, state: str
) -> None:
    receiver.status = status
    receiver.headers = {"Location": f"http://127.0.0.1:{receiver.port}/other"}
    ended = send(jobs, f"webhook:http://127.0.0.1:{receiver.port}/")
    assert ended.state == state
    assert len(receiver.asked) == 1  # no redirect is followed
    assert state == "done" or str(status) in ended.message


@pytest.mark.parametrize(
    ("text", "after_s"),
    [("120", 120), ("in 300 s", 300), ("soon", None), ("", None), ("99999999", 86400),
     ("-1", None), (formatdate(0, usegmt=True), 0)],
)  # fmt: skip
def test_retry_after_is_honoured_up_to_a_day(
    receiver: Receiver, text: str, after_s: float | None
) -> None:
    if text == "in 300 s":
        text = formatdate(time.time() + 300, usegmt=True)
    receiver.status, receiver.headers = 503, {"Retry-After": text}
    url = f"http://127.0.0.1:{receiver.port}/"
    answer = webhook.post(url, b"{}", {}, allow=LOCAL)
    assert answer.retry_after_s == (after_s if after_s is None else pytest.approx(after_s, abs=60))


def test_retry_after_reaches_the_queue(jobs: Jobs, receiver: Receiver) -> None:
    from upq import Retry

    receiver.status, receiver.headers = 429, {"Retry-After": "77"}
    new = follow(a_job(), Outcome(FAILED), [f"webhook:http://127.0.0.1:{receiver.port}/"])[0]
    job = jobs.make("notify", new.params, 18, webhook_allow="127.0.0.1")
    with pytest.raises(Retry) as caught:
        job.run()
    assert caught.value.after_s == 77


def test_a_server_that_is_down_is_tried_again(jobs: Jobs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ended = send(jobs, f"webhook:http://127.0.0.1:{port}/hidden")
    assert ended.state == "retry"
    assert "refused" in ended.message
    assert "hidden" not in ended.message


def answering(*parts: bytes, pause_s: float = 0.0) -> tuple[socket.socket, int]:
    """A server that sends these parts with pauses, once."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        try:
            talk, _ = server.accept()
            with talk:
                talk.recv(65536)
                for part in parts:
                    talk.sendall(part)
                    time.sleep(pause_s)
        except OSError:
            return

    threading.Thread(target=serve, daemon=True).start()
    return server, server.getsockname()[1]


def test_a_byte_now_and_then_does_not_hold_it_for_ever() -> None:
    server, port = answering(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 200, pause_s=0.2)
    began_s = time.monotonic()
    with server, pytest.raises(TimeoutError, match="no answer within 1 s"):
        webhook.post(f"http://127.0.0.1:{port}/", b"{}", {}, allow=LOCAL, timeout_s=1.0)
    assert time.monotonic() - began_s < 20


def test_a_silent_server_does_not_hold_it_for_ever(jobs: Jobs) -> None:
    server, port = answering(pause_s=60)
    with server:
        ended = send(jobs, f"webhook:http://127.0.0.1:{port}/", webhook_timeout_s="0.5")
    assert ended.state == "retry"


def test_what_is_read_of_an_answer_has_a_limit(receiver: Receiver) -> None:
    receiver.body = b"x" * (50 << 20)
    read = 0
    recv_into = socket.SocketIO.readinto

    def counting(self: socket.SocketIO, buffer: Any) -> Any:
        nonlocal read
        n = recv_into(self, buffer)
        if threading.current_thread() is threading.main_thread():
            read += n or 0
        return n

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.SocketIO, "readinto", counting)
        answer = webhook.post(f"http://127.0.0.1:{receiver.port}/", b"{}", {}, allow=LOCAL)
    assert answer.is_well
    assert 0 < read < 4 * webhook.BODY_LIMIT_BYTES


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\0" * 70000])
def test_what_is_no_http_is_tried_again(jobs: Jobs, answer: bytes) -> None:
    server, port = answering(answer)
    with server:
        assert send(jobs, f"webhook:http://127.0.0.1:{port}/").state == "retry"


# TLS


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[ssl.SSLContext, Path]:
    if not shutil.which("openssl"):
        pytest.skip("no program openssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=hook.test", "-addext", "subjectAltName=DNS:hook.test", "-keyout", str(key), "-out",
         str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context, cert


def test_tls_is_verified_for_the_name_though_the_address_is_pinned(
    jobs: Jobs, certificate: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, cert = certificate
    secure = Receiver(context)
    local = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", secure.port))]
    asked: list[str] = []

    def resolve(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        return local

    real = socket.getaddrinfo

    def only_names(host: str, *more: Any, **named: Any) -> Any:
        return real(host, *more, **named) if host[0].isdigit() else resolve(host)

    monkeypatch.setattr(socket, "getaddrinfo", only_names)
    target = f"webhook:https://hook.test:{secure.port}/"
    try:
        untrusted = send(jobs, target)
        assert untrusted.state == "retry"
        assert "certificate verify failed" in untrusted.message
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        assert send(jobs, target).state == "done"
        other = send(jobs, f"webhook:https://other.test:{secure.port}/")
        assert (other.state, "other.test" in other.message) == ("retry", True)
        assert len(secure.asked) == 1
        assert secure.asked[0][2]["Host"] == f"hook.test:{secure.port}"
        assert asked == ["hook.test", "hook.test", "other.test"]  # once each time
    finally:
        secure.close()


# What must not be reached (T27)


INSIDE = [
    *("127.0.0.1", "127.1", "127.9.9.9", "2130706433", "0x7f000001", "0x7f.1", "017700000001"),
    *("0", "0.0.0.0", "localhost", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "169.254.169.254", "2852039166"),
    *("0xa9fea9fe", "[::ffff:169.254.169.254]", "[fe80::1]", "[fec0::1]", "[fc00::1]", "[fd00::1]"),
    *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "198.18.0.1"),
    *("192.0.2.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "[ff02::1]"),
    *("[2001:db8::1]", "[2001::1]", "[64:ff9b:1::1]", "[::ffff:10.0.0.1]", "[2002:a00:1::]"),
    *("[64:ff9b::a9fe:a9fe]", "192.0.0.8", "[100::1]"),
]


@pytest.mark.parametrize("host", INSIDE)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nothing_inside_is_reached(
    jobs: Jobs, receiver: Receiver, scheme: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: tried.append(a))
    url = f"{scheme}://{host}:{receiver.port}/"
    ended = send(jobs, f"webhook:{url}", webhook_allow="")
    assert ended.state in ("abort", "retry")
    assert tried == []
    assert receiver.asked == []
    if ended.state == "retry":  # a form that this system's resolver does not take at all
        assert "not known" in ended.message or "not supported" in ended.message


@pytest.mark.parametrize(
    "text",
    ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"],
)
def test_what_is_public_is(text: str) -> None:
    assert webhook.is_public(ipaddress.ip_address(text))


def test_a_name_that_changes_its_address_is_asked_once(
    jobs: Jobs, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: public when it is judged, local when it is connected to."""
    answers = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1"])
    connected: list[Any] = []

    def resolve(host: str, port: int, *_: Any, **__: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(where: Any, *_: Any, **__: Any) -> Any:
        connected.append(where)
        raise ConnectionRefusedError("in a test")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    send(jobs, f"webhook:http://rebind.test:{receiver.port}/", webhook_allow="")
    assert connected == [("93.184.216.34", receiver.port)]


def test_of_a_name_with_several_addresses_only_a_public_one_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [(0, 0, 0, "", (text, 80)) for text in ("127.0.0.1", "93.184.216.34")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert webhook.resolve("both.test", 80, ()) == "93.184.216.34"


def test_a_redirect_inside_is_not_followed(jobs: Jobs, receiver: Receiver) -> None:
    receiver.status, receiver.headers = 302, {"Location": "http://169.254.169.254/latest"}
    assert send(jobs, f"webhook:http://127.0.0.1:{receiver.port}/").state == "retry"
    assert len(receiver.asked) == 1


def test_what_is_allowed_is_reached_and_its_neighbour_is_not(
    jobs: Jobs, receiver: Receiver
) -> None:
    for host, allow, state in (
        ("127.0.0.1", "10.0.0.0/8 127.0.0.1", "done"),
        ("[::ffff:127.0.0.1]", "127.0.0.1", "done"),
        ("127.0.0.1", "10.0.0.0/8", "abort"),
        ("127.0.0.2", "127.0.0.1/32", "abort"),
        ("[::1]", "127.0.0.0/8", "abort"),
    ):
        target = f"webhook:http://{host}:{receiver.port}/"
        assert send(jobs, target, webhook_allow=allow).state == state, (host, allow)


# Services of the notification library


def test_a_service_is_told_by_the_library(jobs: Jobs, receiver: Receiver) -> None:
    pytest.importorskip("apprise")
    ended = send(jobs, f"json://127.0.0.1:{receiver.port}/hidden")
    assert (ended.state, ended.message) == ("done", "sent to json://***")
    ((_, path, _, body),) = receiver.asked
    told = json.loads(body)
    assert path.rstrip("/") == "/hidden"
    assert told["title"] == f"[upq] hash 17 failed on {socket.gethostname()}: no good"
    assert "upq-cli retry 17" in told["message"]
    assert told["type"] == "failure"


def test_a_service_that_is_down_is_tried_again_and_its_secrets_are_not_told(
    jobs: Jobs, receiver: Receiver, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    pytest.importorskip("apprise")
    receiver.status = 503
    root, kept = logging.getLogger(), StringIO()
    handler, level = logging.StreamHandler(kept), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    logging.debug("heard")
    try:
        ended = send(jobs, f"json://user:hidden1@127.0.0.1:{receiver.port}/hidden2?+X=hidden3")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert "heard" in kept.getvalue()
    assert ended.state == "retry"
    assert ended.message.startswith("json://***: not delivered.")
    assert "503" in ended.message
    said = capfd.readouterr()
    for text in (ended.message, kept.getvalue(), said.out, said.err):
        assert "hidden" not in text
    receiver.status = 200
    assert send(jobs, f"json://127.0.0.1:{receiver.port}/").state == "done"


def test_a_url_the_library_cannot_read_fails_for_good(jobs: Jobs) -> None:
    pytest.importorskip("apprise")
    ended = send(jobs, "discord://hidden")
    assert (ended.state, "hidden" in ended.message) == ("abort", False)


def test_without_the_library_it_waits_for_it(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    ended = send(jobs, "ntfy://host/hidden")
    assert ended.state == "retry"
    assert ended.message == "ntfy://***: needs the extra `notify`: pip install 'upq[notify]'"


# In a daemon


def test_secrets_of_targets_are_nowhere_to_be_seen(short_tmp: Path, receiver: Receiver) -> None:
    pytest.importorskip("apprise")
    hook = f"webhook:http://127.0.0.1:{receiver.port}/hidden1?k=hidden2"
    service = f"json://127.0.0.1:{receiver.port}/hidden3"
    down = "json://user:hidden4@127.0.0.1:9/hidden5"
    config = (
        f"[job work]\nnotify_fail = {hook} {service} {down}\n[job notify]\nconcurrent = 3\n"
        "[webhook]\nallow = 127.0.0.0/8\nsecret = hidden6\n"
    )
    daemon = Daemon(short_tmp, config, work="def run(self):\n    return False")
    shutil.copy(JOBS_DIR / "notify.py", short_tmp / "jobs")
    with daemon:
        assert daemon.attempt("--check").returncode == 0
        daemon.run("work")
        until(lambda: len(receiver.asked) == 2)
        until(
            lambda: any(j["message"] for j in daemon.ask("jobs type:notify state:queued")["jobs"])
        )
        told = daemon.say("jobs type:notify") + daemon.say("status") + daemon.log
        for job in daemon.ask("jobs type:notify")["jobs"]:
            told += daemon.say(f"show {job['id']}") + daemon.say(f"why {job['id']}")
        assert "json://***" in told
        assert f"webhook:http://127.0.0.1:{receiver.port}/***" in told
        assert "hidden" not in told
        assert {json.loads(a[3]).get("jobcfg", {}).get("notify_fail") for a in receiver.asked} == {
            "***", None
        }  # fmt: skip
        daemon.end()


def test_a_submit_names_targets_that_the_configuration_allows(
    short_tmp: Path, receiver: Receiver
) -> None:
    pytest.importorskip("apprise")
    hook = f"webhook:http://127.0.0.1:{receiver.port}"
    config = (
        "[job work]\n[job grouped]\nnotify_fail = mail:root\nnotify_after = 5\n[job notify]\n"
        f"[access]\nnotify = {hook}/mine/* mail:*@example.org json://*/*\n"
        "[webhook]\nallow = 127.0.0.1\n[mail]\nserver = 127.0.0.1:9\n"
    )
    work = "def run(self):\n    return self.jobdata.get('how') == 'well'"
    daemon = Daemon(short_tmp, config, work=work, grouped=work)
    shutil.copy(JOBS_DIR / "notify.py", short_tmp / "jobs")
    with daemon:
        for refused, why in {
            "@notify:syslog": "denied @notify_fail: syslog is not in [access] notify",
            "@notify:mail:a@evil.org,b@example.org": "denied",
            f"@notify_fail:{hook}/yours/hidden": "denied",
            "@notify:mail": "bad_params",
            "@notify:pigeon:x": "bad_params",
        }.items():
            reply = daemon.say(f"work {refused}")
            assert reply.startswith(f"ERR {why}"), reply
            assert "hidden" not in reply
        daemon.run(f"work how:well @notify:{hook}/mine/1")
        daemon.run(f"work @notify:{hook}/mine/2")
        daemon.run(f"work @notify_success:{hook}/mine/never")
        daemon.run(f"work how:well @notify_fail:{hook}/mine/never")
        daemon.run(f"grouped @notify_fail:{hook}/mine/3")
        line = {"submit": "work", "options": {"notify": [f"{hook}/mine/4"]}}
        assert json.loads(daemon.say(json.dumps(line)))
        until(lambda: len(receiver.asked) == 4)
        paths = sorted(path for _, path, _, _ in receiver.asked)
        assert paths == [f"/mine/{n}" for n in range(1, 5)]
        daemon.end()


def test_by_default_a_submit_names_nobody(short_tmp: Path) -> None:
    with Daemon(short_tmp, "[job test]\n") as daemon:
        assert daemon.say("test @notify:mail:me@example.org").startswith("ERR denied ")
        daemon.end()


@pytest.mark.parametrize("limit", ["", "timeout = 5m"])
def test_a_step_of_a_mail_does_not_limit_a_notification(short_tmp: Path, limit: str) -> None:
    server, port = answering(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 0\r\n\r\n", pause_s=0.5)
    config = (
        f"[job work]\nnotify_fail = webhook:http://127.0.0.1:{port}\n[job notify]\n{limit}\n"
        "[webhook]\nallow = 127.0.0.1\ntimeout = 5m\n[mail]\ntimeout = 0.1s\n"
    )
    daemon = Daemon(short_tmp, config, work="def run(self):\n    return False")
    shutil.copy(JOBS_DIR / "notify.py", short_tmp / "jobs")
    with server, daemon:
        daemon.run("work")
        (told,) = daemon.ask("jobs type:notify")["jobs"]
        told = until(lambda: (job := daemon.job(told["id"]))["message"] and job)
        assert (told["state"], told["message"]) == (
            "done",
            f"sent to webhook:http://127.0.0.1:{port}",
        )
        daemon.end()
