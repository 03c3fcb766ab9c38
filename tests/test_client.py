from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.line_server import Desk, LineServer
from tests.servers import free_port
from upq import errors, protocol, wire
from upq.client import DEFAULT_SOCKET, AsyncClient, Client, find_socket, job
from upq.protocol import Request
from upq.wire import Ack

ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(short_tmp: Path) -> Iterator[LineServer]:
    with LineServer(short_tmp / "upq.sock") as server:
        yield server


@pytest.fixture
def client(server: LineServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def test_a_submit_returns_the_id(client: Client) -> None:
    assert client.submit("hash", {"fid": 50}) == Ack(1, "queued", False)
    assert client.submit("hash").id == 2


def test_any_json_may_be_a_param(server: LineServer, client: Client) -> None:
    params = {"a": [1, None, {"b": "two\nlines \u00fc \u2028"}], "c": 1.5, "d": True}
    client.submit("hash", params)
    request = protocol.parse(server.lines[0][:-1])
    assert request is not None
    assert request.params == params


def test_options_are_sent_as_the_protocol_wants_them(server: LineServer, client: Client) -> None:
    at = datetime(2026, 12, 1, 2, tzinfo=UTC)
    client.submit("a", in_=timedelta(minutes=10), after=(1, 2), key="k", queue=None)
    client.submit("a", at=at, timeout="30s", retries=3, priority="high")
    first, second = (protocol.parse(line[:-1]) for line in server.lines)
    assert first is not None
    assert second is not None
    assert first.options == protocol.Options(in_s=600, after=(1, 2), key="k")
    assert second.options.run_at == at.timestamp() * 1_000_000
    assert (second.options.timeout_s, second.options.priority) == (30, 10)


def test_a_repeated_key_is_told(client: Client) -> None:
    assert client.submit("hash", key="k") == Ack(1, "queued")
    assert client.submit("hash", key="k") == Ack(1, "duplicate", True)


def test_submit_many_is_one_request(server: LineServer, client: Client) -> None:
    acks = client.submit_many([job("a", {"n": 1}), job("b", key="k"), job("c", key="k")])
    assert acks == [Ack(1, "queued"), Ack(2, "queued"), Ack(2, "duplicate", True)]
    assert len(server.lines) == 1


@pytest.mark.parametrize("error", errors.RequestError.__subclasses__())
def test_a_refusal_raises_the_error_of_its_code(
    server: LineServer, client: Client, error: type[errors.RequestError]
) -> None:
    server.answer = lambda request: wire.err(error.code, "no, because", json=True)
    with pytest.raises(error, match="no, because") as raised:
        client.submit("hash")
    assert type(raised.value) is error
    server.answer = Desk().answer
    assert client.submit("hash").id == 1


def test_an_unknown_code_is_a_request_error_with_that_code(server: LineServer) -> None:
    server.answer = lambda request: wire.err("brand_new", "x", json=True)
    with Client(server.address) as client, pytest.raises(errors.RequestError) as raised:
        client.verb("ping")
    assert raised.value.code == "brand_new"
    assert errors.RequestError.code == "internal"


def test_verbs_return_their_data(server: LineServer, client: Client) -> None:
    client.submit("hash", {"fid": 50})
    assert client.wait(1)["state"] == "done"
    assert client.verb("ping")["pong"]
    replies = {
        "show": {"job": {}, "history": []},
        "jobs": {"jobs": [1]},
        "queues": {"queues": [2]},
        "status": {"pid": 1},
        "cancel": {"id": 17},
        "retry": {"id": 17},
    }
    server.answer = lambda request: wire.ok(replies[request.verb], json=request.json)
    assert client.show(17) == replies["show"]
    assert client.jobs(state="failed", limit=5, queue=None) == [1]
    assert client.queues() == [2]
    assert client.status() == {"pid": 1}
    assert client.cancel(17) == client.retry(17) == {"id": 17}
    asked = [json.loads(line) for line in server.lines if b"jobs" in line]
    assert asked == [{"verb": "jobs", "state": "failed", "limit": 5}]


def test_a_line_of_text_can_be_sent_as_it_is(client: Client) -> None:
    reply = client.request('test msg:"two words"')
    assert (reply.line, reply.acks) == ("ACK 1 queued", (Ack(1, "queued"),))
    assert client.request("show x").code == "bad_params"


def test_waiting_for_a_job_is_longer_than_the_patience_with_the_daemon(server: LineServer) -> None:
    over = threading.Event()

    def answer(request: Request) -> bytes:
        over.wait(0.3)
        return wire.ok({"job": {"state": "done"}}, json=True)

    server.answer = answer
    with Client(server.address, timeout_s=0.1) as client:
        assert client.wait(1)["state"] == "done"
        assert client.wait(1, timeout_s=10)["state"] == "done"
        with pytest.raises(TimeoutError):
            client.verb("ping")


def test_after_a_timeout_the_late_reply_is_not_taken_for_the_next_one(server: LineServer) -> None:
    late = threading.Event()
    desk = Desk()

    def answer(request: Request) -> bytes:
        if request.verb == "slow":
            late.wait(10)
        return desk.answer(request)

    server.answer = answer
    with Client(server.address, timeout_s=0.1) as client:
        with pytest.raises(TimeoutError):
            client.submit("slow")
        late.set()
        with pytest.raises(ConnectionError, match="connect"):
            client.submit("fast", key="k")
        client.timeout_s = 5
        client.connect()
        assert client.submit("fast", key="k") == Ack(desk.keys["k"], "queued")


def test_a_closed_connection_is_a_connection_error_until_connect(server: LineServer) -> None:
    with Client(server.address) as client:
        server.answer = lambda request: None
        with pytest.raises(ConnectionError):
            client.submit("hash")
        server.answer = Desk().answer
        client.connect()
        assert client.submit("hash").id == 1


def test_what_the_daemon_says_before_it_hangs_up_is_told(server: LineServer) -> None:
    server.greeting = wire.err("busy", "too many connections")
    with Client(server.address) as client, pytest.raises(errors.Busy, match="too many"):
        client.submit("hash")


def test_another_server_is_a_connection_error(server: LineServer, client: Client) -> None:
    server.answer = lambda request: b"HTTP/1.1 400 Bad Request\n"
    with pytest.raises(ConnectionError, match="not a reply"):
        client.submit("hash")


def test_no_daemon_is_an_os_error(short_tmp: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Client(short_tmp / "upq.sock")
    with pytest.raises(ConnectionRefusedError):
        Client(f"127.0.0.1:{free_port()}")


def test_a_request_over_the_limit_is_not_sent(server: LineServer, client: Client) -> None:
    with pytest.raises(errors.TooLong):
        client.submit("hash", {"a": "x" * wire.JSON_LIMIT_BYTES})
    assert client.submit("hash", {"a": "x" * (wire.JSON_LIMIT_BYTES - 100)}).id == 1


def test_tcp_is_an_address_too() -> None:
    with LineServer(None) as server, Client(server.address) as client:
        assert client.submit("hash").id == 1


def test_many_lines_are_sent_without_waiting(server: LineServer, client: Client) -> None:
    lines = [b"test n:%d text:%s\n" % (n, b"x" * 500) for n in range(5000)]
    chunks = (b"".join(lines[n : n + 50]) for n in range(0, 5000, 50))
    assert [reply.acks[0].id for reply in client.pipeline(chunks)] == [*range(1, 5001)]
    assert client.verb("ping")


def test_replies_far_larger_than_requests_do_not_block_the_pipeline(server: LineServer) -> None:
    server.answer = lambda request: wire.ok("x" * 100_000)
    with Client(server.address) as client:
        replies = client.pipeline([b"output 1\n" * 500, b"", b"output 1\n" * 500])
        assert sum(len(reply.data) for reply in replies) == 1000 * 100_000


def test_a_pipeline_tells_of_a_lost_connection_and_of_a_fault_of_its_source(
    server: LineServer,
) -> None:
    def broken() -> Iterator[bytes]:
        yield b"test\n"
        raise KeyError("mine")

    with Client(server.address) as client:
        replies = client.pipeline(broken())
        assert next(replies).acks
        with pytest.raises(KeyError, match="mine"):
            next(replies)
    server.answer = lambda request: None if "last" in request.params else wire.ack(1)
    with Client(server.address) as client:
        replies = client.pipeline([b"test\ntest last\ntest\n"])
        assert next(replies).acks
        with pytest.raises(ConnectionError):
            next(replies)


def test_the_client_of_asyncio_does_the_same(server: LineServer) -> None:
    async def talk() -> None:
        async with AsyncClient(server.address) as client:
            assert await client.submit("hash", {"fid": 1}, key="k") == Ack(1, "queued")
            acks = await asyncio.gather(*(client.submit("hash") for _ in range(20)))
            assert sorted(ack.id for ack in acks) == [*range(2, 22)]
            assert [ack.id for ack in await client.submit_many([job("a"), job("b")])] == [22, 23]
            assert (await client.wait(1, timeout_s=5))["id"] == 1
            with pytest.raises(errors.BadParams):
                await client.verb("show", id="x")
            assert (await client.verb("ping"))["pong"]
            server.answer = lambda request: wire.ok("x" * 1_000_000, json=True)
            assert len(await client.verb("output", id=1)) == 1_000_000

    asyncio.run(talk())


def test_the_client_of_asyncio_closes_after_a_timeout() -> None:
    async def talk(server: LineServer) -> None:
        async with AsyncClient(server.address) as client:
            client.timeout_s = 0.1
            with pytest.raises(TimeoutError):
                await client.submit("slow")
            with pytest.raises(ConnectionError, match="connect"):
                await client.submit("fast")
            server.answer = Desk().answer
            client.timeout_s = 5
            await client.connect()
            assert (await client.submit("fast")).id == 1

    late = threading.Event()

    def answer(request: Request) -> None:
        late.wait(10)

    with LineServer(None, answer) as server:
        asyncio.run(talk(server))
        late.set()


# Where the daemon is


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_socket_is_read_from_the_configuration(tmp_path: Path) -> None:
    cfg = write(tmp_path / "a/upq.cfg", "[paths]\nsocket = run/upq.sock\n[job x]\nx = 50%\n")
    assert find_socket(str(cfg), {}) == f"{tmp_path}/a/run/upq.sock"
    write(cfg, "[paths]\nsocket = /run/${WHO}/s\n")
    assert find_socket(str(cfg), {"WHO": "me"}) == "/run/me/s"
    write(tmp_path / "a/upq.d/10.cfg", "[paths]\nsocket = other.sock\n")
    assert find_socket(str(cfg), {}) == f"{tmp_path}/a/other.sock"
    assert find_socket(str(cfg), {"UPQ_PATHS__SOCKET": "/x"}) == "/x"


def test_without_a_socket_it_is_in_the_state_dir(tmp_path: Path) -> None:
    cfg = write(tmp_path / "upq.cfg", "[db]\nurl =\n")
    assert find_socket(str(cfg), {}) == f"{tmp_path}/var/upq.sock"
    write(cfg, "[paths]\nsocket =\nstate_dir = /var/lib/upq\n")
    assert find_socket(str(cfg), {}) == "/var/lib/upq/upq.sock"


def test_the_configuration_is_looked_for_in_a_known_order(tmp_path: Path) -> None:
    def named(name: str) -> str:
        return str(write(tmp_path / name / "upq.cfg", f"[paths]\nsocket = /{name}\n"))

    env = {"UPQ_CONFIG": named("env"), "UPQ_SOCKET": "/direct", "XDG_CONFIG_HOME": str(tmp_path)}
    here = str(Path(named("here")).parent)
    named("upq")
    assert find_socket(named("option"), env, here) == "/option"
    assert find_socket(None, env, here) == "/env"
    del env["UPQ_CONFIG"]
    assert find_socket(None, env, here) == "/direct"
    del env["UPQ_SOCKET"]
    assert find_socket(None, env, here) == "/here"
    assert find_socket(None, env, str(tmp_path)) == "/upq"


@pytest.mark.skipif(Path("/etc/upq/upq.cfg").exists(), reason="upq is installed on this machine")
def test_the_last_guess_is_where_the_packaged_daemon_listens(tmp_path: Path) -> None:
    assert find_socket(None, {"XDG_CONFIG_HOME": str(tmp_path)}, str(tmp_path)) == DEFAULT_SOCKET


def test_a_named_configuration_has_to_be_readable(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        find_socket(str(tmp_path / "no.cfg"), {})
    for broken in b"socket = /x\n", b"[paths]\n\xff = 1\n":
        (tmp_path / "upq.cfg").write_bytes(broken)
        with pytest.raises(ValueError, match=r"upq\.cfg"):
            find_socket(str(tmp_path / "upq.cfg"), {})


def test_the_client_is_light_to_import() -> None:
    code = "import sys, upq.client; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    heavy = {"asyncio", "dataclasses", "datetime", "logging", "sqlalchemy", "upq.plugins"}
    assert heavy & set(run.stdout.decode().split()) == set()
