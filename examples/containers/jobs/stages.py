"""The life of a container: its stages in order, and what a request for one has to say."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Stage(NamedTuple):
    #: What the user is told while it is at work or waited for.
    text: str
    #: What it takes of a request, besides the number of the container.
    takes: tuple[str, ...] = ()


STAGES = {
    "create": Stage("Creating VM", ("ostemplate",)),
    "setup": Stage("Setting up VM", ("ipadd", "hname", "nserver", "usr", "pwd")),
    "start": Stage("Booting VM"),
    "stop": Stage("Running, please login", ("uptime",)),
    "destroy": Stage("Removing VM"),
}

#: The lowest number of a container: OpenVZ keeps those below for itself.
LOWEST = 101
#: As upq reads a `delay`.
UPTIME = re.compile(r"[0-9]+(\.[0-9]+)?|([0-9]+(\.[0-9]+)?(ms|[smhdw]))+")
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def until(last: str) -> list[str]:
    """The stages up to that one."""
    names = list(STAGES)
    return names[: names.index(last) + 1]


def part(stage: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """What that stage takes of a request."""
    takes = ("cid", *STAGES[stage].takes)
    return {name: request[name] for name in takes if name in request}


def flat(request: Mapping[str, Any]) -> dict[str, Any]:
    """`{"cid": 501, "net": {"ipadd": ...}}` as `{"cid": 501, "ipadd": ...}`.

    Raises ValueError when a name is there twice.
    """
    found: dict[str, Any] = {}
    for name, value in request.items():
        for inner, one in (flat(value) if isinstance(value, Mapping) else {name: value}).items():
            if inner in found:
                raise ValueError(f"{inner}: is given twice")
            found[inner] = one
    return found


def checked(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request that may be nested, made flat. Raises ValueError that says what is wrong."""
    found = flat(request)
    cid = str(found.get("cid", ""))
    if not re.fullmatch("[0-9]{1,9}", cid) or int(cid) < LOWEST:
        raise ValueError(f"cid: {cid!r} is not a number from {LOWEST} on")
    found["cid"] = int(cid)
    readers = {
        "ipadd": ipaddress.ip_interface,
        "nserver": ipaddress.ip_address,
        "hname": host_name,
        "uptime": uptime,
    }
    for name, read in readers.items():
        if name in found:
            try:
                read(found[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return found


def several(request: Mapping[str, Any], instances: int) -> list[dict[str, Any]]:
    """The requests for so many containers: number, address and name of each are one up.

    Raises ValueError.
    """
    if instances < 1:
        raise ValueError(f"instances: {instances} is less than 1")
    first = checked(request)
    return [checked(first | following(first, nth)) for nth in range(instances)]


def following(first: Mapping[str, Any], nth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"cid": first["cid"] + nth}
    if "ipadd" in first:
        address = ipaddress.ip_interface(first["ipadd"])
        found["ipadd"] = f"{address.ip + nth}/{address.network.prefixlen}"
    if "hname" in first:
        found["hname"] = f"{first['hname']}{nth + 1}"
    return found


def host_name(text: str) -> str:
    if not HOST_NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not the name of a host")
    return text


def uptime(value: Any) -> str:
    """It is found out here, not when a container runs that cannot be stopped."""
    if not UPTIME.fullmatch(str(value)):
        raise ValueError(f"{value!r} is not a time such as 20s, 10m or 2h")
    return str(value)
