"""A POST to an address that others chose: resolved once, pinned, and never inside our own network.

Blocking, for jobs. What is sent and when is not known here.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import hmac
import http.client
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

#: Bytes of the answer's body that are read, and thrown away.
BODY_LIMIT_BYTES = 64 << 10
#: The longest that an answer may have us wait.
RETRY_AFTER_LIMIT_S = 86400.0

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_URL = re.compile(r"https?://[A-Za-z0-9._~:\[\]-]+([/?][A-Za-z0-9._~:/?\[\]@!$&'()*+,;=%|-]*)?")
#: Addresses in which others are wrapped, with the bits that stand behind theirs.
_WRAPPED = {
    ipaddress.IPv6Network("::ffff:0:0/96"): 0,
    ipaddress.IPv6Network("::/96"): 0,
    ipaddress.IPv6Network("64:ff9b::/96"): 0,
    ipaddress.IPv6Network("2002::/16"): 80,
}
#: Networks that are ours or nobody's, though `ipaddress` takes some for public.
_OURS = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "2001::/23", "fec0::/10"),
    )
)


class Forbidden(Exception):
    """The host is at no address that may be told."""


class Answer(NamedTuple):
    status: int
    #: Seconds to wait, when the answer said so.
    retry_after_s: float | None

    @property
    def is_well(self) -> bool:
        return 200 <= self.status < 300

    @property
    def is_final(self) -> bool:
        """Whether to send it again would change nothing."""
        return 400 <= self.status < 500 and self.status not in (408, 425, 429)


def fault(url: str) -> str:
    """What is wrong with a URL; "" when nothing is. The text does not repeat it."""
    if not _URL.fullmatch(url):
        return "not http://host... or https://host..., without user and password"
    try:
        parts = urlsplit(url)
        if parts.port == 0 or not parts.hostname:
            return "host or port is missing"
    except ValueError as error:
        return f"not a URL: {error}"
    return ""


def networks(text: str) -> tuple[Network, ...]:
    """Networks such as `10.0.0.0/8 ::1`. Raises ValueError."""
    return tuple(map(ipaddress.ip_network, re.split(r"[\s,]+", text.strip()) if text else ()))


def is_public(address: Address) -> bool:
    """Whether an address is out in the world, whatever it is wrapped in."""
    if isinstance(address, ipaddress.IPv6Address):
        for network, shift in _WRAPPED.items():
            if address in network:
                return is_public(ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF))
    if any(address in network for network in _OURS):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def may_tell(address: Address, allow: Sequence[Network]) -> bool:
    mapped = getattr(address, "ipv4_mapped", None) or address
    return is_public(address) or any(mapped in network for network in allow)


def resolve(host: str, port: int, allow: Sequence[Network]) -> str:
    """The one address to connect to. Raises OSError, or Forbidden when there is none."""
    found = [
        str(where[0]).partition("%")[0]
        for *_, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ]
    for text in found:
        if may_tell(ipaddress.ip_address(text), allow):
            return text
    raise Forbidden(f"{host} is {found[0]}, which is not public: [webhook] allow")


def forbidden_literal(url: str, allow: Sequence[Network]) -> str:
    """Why a URL that names an address may not be told; "" when it may, or names a host."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    return "" if may_tell(address, allow) else f"{host} is not public: [webhook] allow"


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """What a receiver compares with: HMAC-SHA256 over `timestamp.body`."""
    text = b"%d.%s" % (timestamp, body)
    return "sha256=" + hmac.new(secret.encode(), text, hashlib.sha256).hexdigest()


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    allow: Sequence[Network] = (),
    timeout_s: float = 10.0,
) -> Answer:
    """Send it, and say how it was answered. Redirects are answers like any other.

    Raises OSError or http.client.HTTPException, and Forbidden.
    """
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if tls else 80)
    began_s = time.monotonic()
    address = resolve(host, port, allow)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    if tls:
        connection.default_port = 443
    with contextlib.closing(connection):
        left_s = max(timeout_s - (time.monotonic() - began_s), 0.1)
        sock = socket.create_connection((address, port), left_s)
        connection.sock = sock
        with _deadline(sock, timeout_s, began_s) as over:
            if tls:
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(sock, server_hostname=host)
            connection.request("POST", target, body, {**headers, "Connection": "close"})
            response = connection.getresponse()
            if over.is_set():  # to http.client headers may end where the connection does
                raise TimeoutError("in the middle of the answer")
            after_s = _seconds(response.headers.get("Retry-After", ""))
            with contextlib.suppress(OSError, http.client.HTTPException):
                response.read(BODY_LIMIT_BYTES)  # it has answered, whatever comes now
            return Answer(response.status, after_s)


@contextlib.contextmanager
def _deadline(sock: socket.socket, timeout_s: float, began_s: float) -> Iterator[threading.Event]:
    """Cut the connection when the time is over: a server may send a byte now and then for ever."""
    over = threading.Event()
    line = socket.socket(fileno=os.dup(sock.fileno()))

    def cut() -> None:
        over.set()
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(timeout_s - (time.monotonic() - began_s), 0.1), cut)
    timer.daemon = True
    timer.start()
    try:
        yield over
    except (OSError, http.client.HTTPException) as error:
        if over.is_set():
            raise TimeoutError(f"no answer within {timeout_s:g} s") from error
        raise
    finally:
        timer.cancel()
        timer.join()
        line.close()


def _seconds(text: str) -> float | None:
    """Seconds of a Retry-After, which is a number or a date."""
    seconds: float
    if re.fullmatch(r"[0-9]{1,9}", text.strip()):
        seconds = float(text)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), RETRY_AFTER_LIMIT_S)
