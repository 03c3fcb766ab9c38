"""Sites on an appserver: unpacked, started as a user of their own, managed, retired."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from deploylib import bundle, store
from deploylib.plan import HOOKS, Plan
from deploylib.settings import Settings, TaskError, valid_app
from deploylib.steps import Report, Steps, as_user, forget, group_folder, releases, run, write_whole

STEPS = ["download", "create user", "extract", "run"]
PATIENCE_S = 20.0
MIN_FREE_BYTES = 1 << 28


def deploy(
    settings: Settings, report: Report, *, app: str, release: str, server: str, sha256: str,
    zoombuild: str, database: str, password: str,
) -> dict[str, Any]:  # fmt: skip
    """Start a release of a site beside those that run. Steps that have ended are not done again."""
    plan = Plan.parse(zoombuild)
    home = settings.folder("appserver", int(server), valid_app(app))
    uid = user_of(settings, app, int(server))
    folder = group_folder(home / str(int(release)), uid)
    steps = Steps(folder, STEPS, report)
    file = folder / "bundle.tar.gz"
    steps.do("download", store.fetch, settings, sha256, file)
    steps.do("create user", _make_home, home / "home", uid)
    steps.do("extract", bundle.extract, file, sha256, folder)
    file.unlink(missing_ok=True)
    env = _environment(home / "home", json.loads(database), password, plan)
    write_whole(folder / "env.json", json.dumps(env), 0o600)
    address = settings.appservers[int(server)]
    port = steps.do("run", _start, folder, plan, env, address, uid)
    if not _running(folder):  # its daemon died before the end of this task was stored, and it too
        port = _start(folder, plan, env, address, uid)
    return {
        "instance": f"{app}.{release}@{server}", "server": int(server), "address": address,
        "port": port, "uid": uid, "steps": STEPS,
    }  # fmt: skip


def manage(
    settings: Settings, report: Report, *, app: str, release: str, server: str, hook: str
) -> dict[str, Any]:
    """One of the hooks after a deployment, with the site's own user, database and packages."""
    folder = settings.folder("appserver", int(server), valid_app(app)) / str(int(release))
    report(1, 1, hook)
    env = json.loads((folder / "env.json").read_text())
    argv = [str(folder / "env/bin/python"), "manage.py", *HOOKS[hook]]
    run(argv, folder / "site", env, user_of(settings, app, int(server)))
    return {"hook": hook, "server": int(server)}


def retire(
    settings: Settings, report: Report, *, app: str, release: str, server: str
) -> dict[str, Any]:
    """Stop the releases of a site before this one, and remove the oldest of them."""
    home = settings.folder("appserver", int(server), valid_app(app))
    earlier = [number for number in releases(home) if number < int(release)]
    stopped = [number for number in earlier if stop(home / str(number))]
    removed = forget(home, int(release), settings.keep)
    report(1, 1, f"{len(stopped)} stopped, {len(removed)} removed")
    return {"stopped": stopped, "removed": removed}


def measure(settings: Settings, report: Report, *, server: str) -> dict[str, Any]:
    """How an appserver is."""
    free_bytes = shutil.disk_usage(settings.folder("appserver", int(server))).free
    report(1, 1, "measured")
    return {
        "server": int(server),
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 3),
        "healthy": free_bytes >= MIN_FREE_BYTES,
    }


def user_of(settings: Settings, app: str, server: int) -> int:
    """The uid of an application on an appserver, given out when it is asked for first; 0: ours."""
    if not as_user(settings.first_uid):
        return 0
    folder = settings.folder("appserver", server)
    with (folder / "users.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "users.json"
        users: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
        if app not in users:
            users[app] = max(users.values(), default=settings.first_uid) + 1
            write_whole(file, json.dumps(users))
        return users[app]


def _make_home(home: Path, uid: int) -> None:
    home.mkdir(exist_ok=True)
    if uid:
        os.chown(home, uid, uid)
    home.chmod(0o700)


def _environment(home: Path, database: dict[str, Any], password: str, plan: Plan) -> dict[str, str]:
    url = "postgresql://{user}:{password}@{host}:{port}/{name}"
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "DATABASE_URL": url.format(**{**database, "password": password}),
        "ALLOWED_HOSTS": " ".join(plan.hosts),
    }


def _start(folder: Path, plan: Plan, env: dict[str, str], address: str, uid: int) -> int:
    """Start the web server and wait until it answers; returns its port."""
    stop(folder)
    with socket.create_server((address, 0)) as door, (folder / "server.log").open("w") as log:
        port = int(door.getsockname()[1])
        # The token by which upq knows what a task has started: a deployment that is cancelled, or
        # whose daemon dies, leaves no server behind.
        env = {**{k: v for k, v in os.environ.items() if k.startswith("UPQ_")}, **env}
        started = subprocess.Popen(
            [
                *(str(folder / "env/bin/python"), "-m", "gunicorn", "--workers", "1"),
                *("--bind", f"fd://{door.fileno()}", "--worker-tmp-dir", "/dev/shm", plan.wsgi),
            ],
            cwd=folder / "site", env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            pass_fds=[door.fileno()], start_new_session=True, **as_user(uid),
        )  # fmt: skip
        write_whole(folder / "pid", f"{started.pid} {_start_time(started.pid)}")
    try:
        _until_answers(started, address, port, plan.hosts[0])
    except TaskError as error:
        stop(folder)
        said = (folder / "server.log").read_text(errors="replace").strip().splitlines()
        raise TaskError(said[-1] if said else str(error)) from error
    return port


def _until_answers(started: subprocess.Popen[bytes], address: str, port: int, host: str) -> None:
    """Whatever it answers: its database may have no tables yet."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        if started.poll() is not None:
            raise TaskError(f"the web server has ended with {started.returncode}")
        connection = http.client.HTTPConnection(address, port, timeout=PATIENCE_S)
        try:
            connection.request("GET", "/", headers={"Host": host})
            connection.getresponse().read()
            return
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > deadline_s:
                raise TaskError(f"the web server does not answer: {error}") from error
        finally:
            connection.close()
        time.sleep(0.02)


def stop(folder: Path) -> bool:
    """End the web server of a release, if it runs; returns whether it did."""
    was_running = bool(_running(folder))
    for signum in signal.SIGTERM, signal.SIGKILL:
        deadline_s = time.monotonic() + PATIENCE_S
        if pid := _running(folder):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signum)
        while _running(folder) and time.monotonic() < deadline_s:
            time.sleep(0.02)
    (folder / "pid").unlink(missing_ok=True)
    return was_running


def _running(folder: Path) -> int:
    """The pid of the web server of a release; 0 when it does not run."""
    file = folder / "pid"
    if not file.exists():
        return 0
    pid, start_time = file.read_text().split()
    return int(pid) if _start_time(int(pid)) == start_time else 0


def _start_time(pid: int) -> str:
    """What tells a process from a later one with the same number; "" when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
