"""Domains of a hypervisor, by virsh. Which one it talks to says LIBVIRT_DEFAULT_URI.

A task that finds its work done does nothing: it may be run again after a crash.
"""

from __future__ import annotations

import subprocess
import time
from typing import Any

from vdi.site import Failed, name_of

SHUT_OFF, RUNNING, PAUSED = "shut off", "running", "paused"


def virsh(*words: str) -> str:
    """What virsh says. Raises Failed."""
    done = subprocess.run(["virsh", "-q", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(done.stderr.strip() or f"virsh {words[0]}: exit code {done.returncode}")
    return done.stdout.strip()


def state(domain: str) -> str:
    return virsh("domstate", name_of(domain))


def check_domain(domain: str) -> dict[str, Any]:
    """Whether a domain could start: start it paused, and end it again."""
    if state(domain) == SHUT_OFF:
        virsh("start", "--paused", domain)
    found = state(domain)
    if found == PAUSED:
        virsh("destroy", domain)
    return {"domain": domain, "state": found}


def start_domain(domain: str) -> dict[str, Any]:
    match state(domain):
        case "shut off":
            virsh("start", domain)
        case "paused":
            virsh("resume", domain)
    return {"domain": domain, "state": state(domain)}


def stop_domain(domain: str, grace_s: str = "30") -> dict[str, Any]:
    """Have a domain shut itself down; it is switched off when that takes too long."""
    over = time.monotonic() + float(grace_s)
    if state(domain) == RUNNING:
        virsh("shutdown", domain)
    while state(domain) == RUNNING and time.monotonic() < over:
        time.sleep(0.2)
    if state(domain) != SHUT_OFF:
        virsh("destroy", domain)
    return {"domain": domain, "state": state(domain)}


def create_snapshot(domain: str, name: str) -> dict[str, Any]:
    """A snapshot of disks and memory."""
    if name not in virsh("snapshot-list", "--name", name_of(domain)).split():
        virsh("snapshot-create-as", domain, name_of(name))
    return {"domain": domain, "snapshot": name}


def revert_snapshot(domain: str, name: str) -> dict[str, Any]:
    virsh("snapshot-revert", name_of(domain), name_of(name))
    return {"domain": domain, "snapshot": name, "state": state(domain)}
