"""Fetching by HTTP, for jobs. Not a job."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Collection, Iterator, Mapping
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from urllib import request
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from upq import Abort, Retry

#: Client errors that may be over at the next try.
PASSING = (408, 425, 429)


def make_opener() -> request.OpenerDirector:
    """Speaks HTTP and HTTPS only, through redirects too."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(),
        request.HTTPRedirectHandler(),
        request.HTTPDefaultErrorHandler(),
        request.HTTPErrorProcessor(),
        request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


@contextlib.contextmanager
def fetch(
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    timeout_s: float = 30,
    expected: Collection[int] = (),
) -> Iterator[HTTPResponse | HTTPError]:
    """The open answer to a GET, with `code`, `headers` and `read1`; good ones and `expected` ones.

    Raises Retry for what may pass, while the body is read too, and Abort for what will not.
    """
    try:
        try:
            answer = make_opener().open(
                request.Request(url, headers=headers or {}), None, timeout_s
            )
        except HTTPError as error:
            if error.code not in expected:
                raise refused(url, error) from error
            answer = error
        with answer:
            yield answer
    except (OSError, HTTPException) as error:
        raise Retry(f"{url}: {getattr(error, 'reason', error)}") from error


def refused(url: str, error: HTTPError) -> Abort | Retry:
    text = f"{url}: {error.code} {error.reason}"
    error.close()
    if error.code < 500 and error.code not in PASSING:
        return Abort(text)
    after = error.headers.get("Retry-After", "")
    return Retry(text, after=float(after) if after.isdecimal() else None)


def fault(url: str) -> str:
    """What is wrong with a web address; "" when nothing is."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018
    except ValueError as error:
        return f"{url}: {error}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"{url!r} is not an http or https address"
    if parts.username is not None:
        return "an address with user and password in it is not supported"
    return ""


def plain(url: str) -> str:
    """The address with blanks and letters beyond ASCII written as %20."""
    return quote(url, safe=string.punctuation)


def seconds(http_date: str | None) -> float:
    """Seconds since 1970 of a date such as Last-Modified; 0 for none or one that cannot be read."""
    try:
        return max(parsedate_to_datetime(http_date or "").timestamp(), 0)
    except ValueError:
        return 0
