"""From the command line to a running daemon: arguments, checks, and becoming one.

What the daemon is made of is in `daemon`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pwd
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import daemon as python_daemon

from upq import __version__, config, vault
from upq import log as logs
from upq.daemon import Daemon, lock, set_up_log
from upq.errors import CannotCreate, ConfigError, NotAllowed, StartError
from upq.jobtypes import JobTypes
from upq.schedule import faults_of
from upq.settings import Settings

#: Python's default of 5 ms lets one busy job delay every reply.
SWITCH_S = 0.0005


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="upq",
        description="Run the upq job dispatcher.",
        epilog="Exit status: 0 stopped, 64 usage, 65 database file damaged, 69 database unusable,"
        " 70 internal fault, 73 a file or socket cannot be made, 75 already running, 77 not"
        " permitted, 78 configuration."
        " What can be set in the ini file: --settings.",
    )
    where = "the ini file; else UPQ_CONFIG, ./upq.cfg, the user's upq/upq.cfg, /etc/upq/upq.cfg"
    made.add_argument("-c", "--config", metavar="FILE", help=where)
    made.add_argument("-l", "--logfile", metavar="FILE", help="log there, whatever [logging] says")
    every = "report every fault of the configuration and of the jobs"
    made.add_argument("--check", action="store_true", help=every)
    made.add_argument("--settings", action="store_true", help="print all settings, one a line")
    key = "put a new key in front of those of a [db] key_file, which is made when it is missing"
    made.add_argument("--new-key", metavar="FILE", help=key)
    stay = "do not detach, whatever [daemon] says"
    made.add_argument("--foreground", action="store_true", help=stay)
    made.add_argument("--version", action="version", version=f"upq {__version__}")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; returns its exit status."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as error:
        return 64 if error.code else 0
    if args.settings or args.check:  # for who reads no further than `head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if args.settings:
        print(config.describe())
        return 0
    try:
        if args.new_key:
            return new_key(args.new_key)
        settings = load(args.config, args.logfile, thorough=args.check)
        if args.check:
            return check(settings)
        for warning in settings.warnings:
            print(f"upq: warning: {warning}", file=sys.stderr)
        if settings.daemon.detach_process and not args.foreground:
            return detach(settings, args.logfile)
        serve(settings, args.logfile)
    except StartError as error:
        for line in str(error).splitlines():
            print(f"upq: {line}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


def find_config(path: str | None) -> Path:
    """`-c`, UPQ_CONFIG, ./upq.cfg, the user's, /etc/upq/upq.cfg. Raises ConfigError."""
    named = path or os.environ.get("UPQ_CONFIG")
    if named:
        return Path(named)
    user = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    places = [Path("upq.cfg"), Path(user) / "upq/upq.cfg", Path("/etc/upq/upq.cfg")]
    for place in places:
        if place.exists():
            return place
    raise ConfigError([f"no configuration: -c FILE, UPQ_CONFIG or {', '.join(map(str, places))}"])


def load(path: str | None, logfile: str | None, *, thorough: bool = False) -> Settings:
    settings = config.load(find_config(path), thorough=thorough)
    if logfile:
        logging_ = replace(settings.logging, logfile=str(Path(logfile).absolute()))
        settings = replace(settings, logging=logging_)
    return settings


def check(settings: Settings) -> int:
    """Report what is wrong beyond the ini file itself: the job modules."""
    for warning in settings.warnings:
        print(f"warning: {warning}")
    types = JobTypes(settings)
    faults = [
        f"{kind.cfg.file}:{kind.cfg.line}: [job {kind.name}] {kind.fault}"
        for kind in types.broken()
    ]
    faults += faults_of(settings, types)
    print(*faults, sep="\n", end="\n" if faults else "")
    if faults:
        return ConfigError.exit_status
    print(f"{settings.file}: {len(settings.jobs)} job types, all well")
    return 0


def new_key(path: str) -> int:
    try:
        count = vault.add_key(path)
    except ValueError as error:
        raise CannotCreate(str(error)) from error
    what = "1 key" if count == 1 else f"{count} keys, the first encrypts"
    print(f"{path}: {what}; keep a copy of it, apart from those of the database")
    return 0


def detach(settings: Settings, logfile: str | None) -> int:
    """Go to the background; the caller's process stays until READY and returns how it went."""
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        with os.fdopen(read) as told:
            said = told.read()
        if said.startswith("ok"):
            return 0
        code, _, text = said.partition(" ")
        print(f"upq: {text or 'the daemon died while it started'}", file=sys.stderr)
        return int(code or 70)
    os.close(read)
    status = 70
    try:
        status = serve(settings, logfile, ready_fd=write)
    except StartError as error:
        status = error.exit_status
        os.write(write, f"{status} {error}".encode())
    finally:
        os._exit(status)


def serve(settings: Settings, logfile: str | None, ready_fd: int | None = None) -> NoReturn:
    """Become the daemon, run until a signal, and exit. With `ready_fd` detached, and told there."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(become(settings, ready_fd))
        settings = inside_chroot(settings)
        set_up_log(settings)
        sys.setswitchinterval(SWITCH_S)
        one = Daemon(settings, lambda: inside_chroot(load(settings.file, logfile)))
        one.catch_signals()
        threading.excepthook = logs.thread_failed
        try:
            one.start()
        except StartError as error:
            logging.getLogger("upq").error("not started: %s", error)
            raise
        if ready_fd is not None:
            os.write(ready_fd, b"ok")
            os.close(ready_fd)
        elif settings.logging.logfile and sys.stderr.isatty():
            print(f"upq: ready; the log is {settings.logging.logfile}", file=sys.stderr)
        one.run()
        one.stop()
    # Threads of jobs that did not end must not meet a half-dismantled interpreter.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(one.exit_status)


@contextlib.contextmanager
def become(settings: Settings, ready_fd: int | None) -> Iterator[None]:
    """python-daemon's context with [daemon]'s settings, and our own pidfile.

    Its own pidfile never breaks a stale lock, and its guess whether to detach is wrong in
    containers; hence ours, and always an explicit detach_process.
    """
    wanted = settings.daemon
    # Closed by whoever started us; python-daemon and every print would stumble over them.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or sys.stdout
    if os.getuid() != 0 and (wanted.chroot_directory or foreign(wanted.uid, os.getuid())):
        raise NotAllowed("[daemon] uid, gid and chroot_directory need root to start with")
    if ready_fd is None and not wanted.chroot_directory and wanted.uid is wanted.gid is None:
        # python-daemon calls setuid() even to stay who we are; the unit's filter refuses that.
        os.chdir("/")
        os.umask(wanted.umask)
        with pidfile(wanted.pidfile):
            yield
        return
    gid = take_groups(wanted.uid, wanted.gid)
    keep = [
        fd for fd in (ready_fd, *range(3, 3 + int(os.environ.get("LISTEN_FDS", "0") or 0))) if fd
    ]
    context = python_daemon.DaemonContext(
        chroot_directory=wanted.chroot_directory or None,
        working_directory="/",
        umask=wanted.umask,
        uid=wanted.uid,
        gid=gid,
        initgroups=False,
        prevent_core=False,
        detach_process=ready_fd is not None,
        files_preserve=keep,
        stdin=None,
        stdout=sys.stdout if ready_fd is None else None,
        stderr=sys.stderr if ready_fd is None else None,
        signal_map={},
    )
    try:
        context.open()
    except python_daemon.daemon.DaemonOSEnvironmentError as error:
        raise NotAllowed(f"[daemon] {error}") from error
    except OSError as error:
        raise CannotCreate(f"[daemon] chroot_directory needs {error.filename}: {error}") from error
    with pidfile(wanted.pidfile):
        yield


def take_groups(uid: int | None, gid: int | None) -> int | None:
    """Become a member of the user's groups; the gid to have. python-daemon's own initgroups forgets
    the primary group.
    """
    if os.getuid() != 0 or uid is None:
        return gid
    user = pwd.getpwuid(uid)
    gid = user.pw_gid if gid is None else gid
    os.initgroups(user.pw_name, gid)
    return gid


def foreign(wanted: int | None, own: int) -> bool:
    return wanted is not None and wanted != own


@contextlib.contextmanager
def pidfile(path: str) -> Iterator[None]:
    """Our pid in a file that we hold locked; a stale file is taken over, a held one never."""
    if not path:
        yield
        return
    fd = lock(Path(path), f"[daemon] pidfile = {path}: another daemon holds it")
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def inside_chroot(settings: Settings) -> Settings:
    """The paths as they are seen from inside [daemon] chroot_directory."""
    root = settings.daemon.chroot_directory.rstrip("/")
    if not root:
        return settings

    def inside(path: str) -> str:
        return path.removeprefix(root) if path.startswith(root + "/") else path

    paths = settings.paths
    paths = replace(
        paths,
        socket=inside(paths.socket),
        jobs_dir=inside(paths.jobs_dir),
        state_dir=inside(paths.state_dir),
        others={name: inside(path) for name, path in paths.others.items()},
    )
    db = replace(settings.db, url=settings.db.url.replace(f"sqlite:///{root}/", "sqlite:////"))
    logging_ = replace(settings.logging, logfile=inside(settings.logging.logfile))
    return replace(settings, paths=paths, db=db, logging=logging_)
