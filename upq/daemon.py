"""The only place that builds things: wires them, starts them in order, stops them in reverse."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from upq import __version__, systemd, when
from upq import log as logs
from upq.census import Census
from upq.cgroup import Groups
from upq.claimer import Claimer
from upq.clock import Clock
from upq.command import CommandJob
from upq.db import Database, hold_file
from upq.desk import Ends, JobDesk
from upq.difference import changes, code_of
from upq.dispatcher import Dispatcher
from upq.errors import (
    CannotCreate,
    Refused,
    RequestError,
    StartError,
)
from upq.events import Bus
from upq.intake import Intake
from upq.jobtypes import JobTypes, pool_key
from upq.lists import Lists
from upq.lobby import Lobby
from upq.nodes import BEAT_S
from upq.plugins import UpqJob
from upq.pool import Pool, SharedPool
from upq.process import ProcessJob
from upq.queue import Queue
from upq.retention import Retention
from upq.runner import Runner
from upq.schedule import Scheduler, faults_of
from upq.server import Door, Place, bind_tcp, bind_unix
from upq.settings import Settings
from upq.slots import Slots
from upq.trees import Lifeline, end_orphans
from upq.vault import Vault
from upq.views import Views

log = logging.getLogger("upq")

#: Seconds between two looks for jobs older than the retention, and for slots older than a day.
PURGE_S, PURGE_SLOTS_S, SLOTS_KEPT_S = 10.0, 600.0, 86400
#: Seconds between two looks at lines of `serial` and of rates that nobody moves.
LINES_S = 60.0
#: Seconds between two looks for cancels that nobody goes on with.
CANCELS_S = 5.0
#: Seconds between two looks for what executors keep and do not need.
TIDY_S = 10.0
#: Seconds between two looks for digests and alerts that are due.
HEALTH_S = 5.0
#: Exit status for a damaged database file: to start again would not help (EX_DATAERR).
DAMAGED = 65
#: Seconds that nobody looks whether a client asks, after which systemd is not told that we live.
DEAF_S = 10.0
#: Failures of one of the daemon's own threads after which it gives up.
ROLE_FAILURES = 5
#: Seconds that commands have to obey TERM when the grace of a stop is over.
LAST_GRACE_S = 1.0


class Daemon:
    """One daemon: `start()`, then `run()` until a signal, then `stop()`.

    load: reads the configuration again, as the command line wants it; raises StartError.
    """

    def __init__(self, settings: Settings, load: Callable[[], Settings]) -> None:
        self.settings = self._at_start = settings
        self._load = load
        self._locks: list[int] = []
        self._lifeline = Lifeline()
        self._groups = Groups(None)
        self._clock = Clock()
        self._doors: list[Door] = []
        self._reloading = threading.Lock()
        self._stopped = threading.Event()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        self.exit_status = 0
        # When the watchdog was last told that we live.
        self._told_s = 0.0
        # Threads that store the ends of jobs which are given up.
        self._declaring: list[threading.Thread] = []
        # Set for the next start to find that this one did not end well.
        self._keep_node = False

    # Start

    def start(self) -> None:
        """Everything up to READY. Raises StartError; repeating any step is harmless."""
        began_s = time.monotonic()
        settings = self.settings
        self._take_locks()
        # Before anything is started that would be left behind in it.
        self._groups = Groups.take()
        self._open_store()
        self._build()
        self._rescue()
        self._open_doors()
        self._clock.every(BEAT_S, "beat", self._beat)
        self._clock.every(PURGE_S, "retention", self._purge)
        self._clock.every(LINES_S, "turns", self._queue.mend_lines)
        self._clock.every(CANCELS_S, "cancels", self._queue.tend_cancels)
        self._clock.every(TIDY_S, "tidy", self._runner.tidy)
        self._clock.every(PURGE_SLOTS_S, "slots", self._purge_slots)
        self._clock.every(HEALTH_S, "health", self._tend_health)
        self._start_role("claimer", self._claimer.run)
        self._start_role("chores", self._tick)
        self._start_role("schedules", self._scheduler.run)
        interval_s = systemd.watchdog_interval_s()
        if interval_s is not None:
            self._start_role("watchdog", partial(self._feed_watchdog, interval_s))
        self._lobby.start()
        for door in self._doors:
            door.start()
        for kind in self._types.broken():
            log.error("[job %s] is broken: %s", kind.name, kind.fault)
        for fault in self._faults(settings):
            log.warning("%s", fault)
        took_s = time.monotonic() - began_s
        doors = ", ".join(map(str, self._doors))
        log.info("ready in %.3f s: %s serves %s", took_s, self._database, doors)
        systemd.notify("READY=1", f"STATUS=running, {settings.file}")

    def _take_locks(self) -> None:
        paths = self.settings.paths
        state = Path(paths.state_dir)
        others = [Path(p) for p in paths.others.values()]
        for folder in (state, Path(self.socket_path).parent, *others):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CannotCreate(f"[paths] {folder}: {error.strerror}") from error
        with contextlib.suppress(OSError):  # who has commands only can do without
            Path(paths.jobs_dir).mkdir(parents=True, exist_ok=True)
        self._locks.append(lock(state / "node.lock", f"another upq daemon uses {state}"))
        self._locks.append(
            lock(Path(f"{self.socket_path}.lock"), f"another upq daemon serves {self.socket_path}")
        )

    @property
    def socket_path(self) -> str:
        return self.settings.paths.socket

    def _open_store(self) -> None:
        settings = self.settings
        state = Path(settings.paths.state_dir)
        self._database = Database(
            settings.db.url,
            durable=settings.db.durability == "full",
            jobs_file=state / "jobs.db",
        )
        self._database.prepare()
        self._bus = Bus()
        # The lock is on this folder: a node of the same name with another one is not us.
        machine = machine_id() + hashlib.sha256(os.fsencode(state.resolve())).hexdigest()[:8]
        self._queue = Queue(self._database, self._bus, settings.node.name, machine)
        try:
            self._queue.open()
        except RequestError as error:
            raise StartError(f"{self._database}: {error}") from error

    def _build(self) -> None:
        """Wire the parts; nothing runs yet."""
        settings = self.settings
        self._types = JobTypes(settings, self._lifeline, self._groups)
        self._code = code_of(settings.paths.jobs_dir)
        vault = self._queue.vault = Vault(settings.db.keys, lambda: self._types.secret)
        self._views = Views(self._database, self._hold, lambda: self._types.secret, vault)
        self._ends = Ends(self._views)
        self._runner = Runner(self._queue, self._types, self._lifeline)
        self._runner.keeper.declare = self._abandon
        self._claimer = Claimer(self._queue, self._runner, self._types.hold)
        self._intake = Intake(settings, self._types, self._queue, self._views)
        lists = Lists(self._views)
        census = Census(self._types, self._queue, self._views, lists, self._claimer)
        self._dispatcher = Dispatcher(
            self._types, self._queue, self._views, lists, self._ends, self._claimer, self._intake,
            census, __version__,
        )  # fmt: skip
        desk = JobDesk(
            self._queue, self._views, self._ends, self._claimer.pool, self._intake, census
        )
        self._runner.desk = self._intake.desk = desk
        self._dispatcher.reload = self.reload
        self._dispatcher.abandoned = lambda: self._runner.threads.abandoned
        self._retention = Retention(self._queue, settings)
        self._slots = Slots(self._queue)
        self._scheduler = Scheduler(self._slots, self._intake.scheduled)
        self._scheduler.configure(settings.schedules)
        self._dispatcher.schedules = self._scheduler.list_all
        self._make_pools()
        self._bus.subscribe(self._ends.hear)

    def _hold(self, lane_id: int) -> str:
        lane = self._queue.lanes.get(lane_id)
        return self._claimer.reason(lane) if lane else ""

    def _make_pools(self) -> None:
        """The pools, and a lane for each type; pools that are gone stay for their jobs."""
        pools = dict(self._claimer.pools)
        settings = self.settings
        own = {job.name: job.concurrent for job in settings.jobs.values()
               if "concurrent" in job.variables}  # fmt: skip
        for cfg in settings.pools_here.values():
            key = pool_key(cfg.name)
            pool = pools.get(key)
            if not isinstance(pool, SharedPool):
                pool = SharedPool(cfg.name, cfg.concurrent, self._runner, self._claimer.room)
                pools[key] = pool
            pool.most, pool.order = own, self._types.rules.order(cfg)
            pool.resize(cfg.concurrent)
        for name, kind in self._types.by_name.items():
            if kind.queue:
                # Only to be seen: while the database is away, the first submit makes it.
                with contextlib.suppress(RequestError):
                    self._queue.lane(kind.queue, name)
            if name in pools:
                pools[name].resize(kind.cfg.concurrent)
            else:
                pools[name] = Pool(name, kind.cfg.concurrent, self._runner, self._claimer.room)
        self._claimer.configure(pools, self._types.rules)

    def _rescue(self) -> None:
        """Take back what earlier incarnations of this node were running when they died."""
        dead = self._queue.dead_nodes()
        self._take_back()
        self._groups.sweep()
        self._queue.forget_nodes(dead)
        # What earlier ones were cancelling; soon, and nothing of it starts meanwhile.
        self._queue.tend_cancels(at_once=True)
        self._claimer.heat()
        if dead and self._database.kind == "sqlite":
            threading.Thread(target=self._quick_check, name="quick_check", daemon=True).start()

    def _take_back(self) -> None:
        orphans = self._queue.orphans()
        if orphans:
            end_orphans({one.token for one in orphans})
            log.info("Starting %d unfinished jobs found in DB.", len(orphans))
            self._queue.rescue(orphans, self._runner.crashed)

    def _beat(self) -> None:
        """Say that this daemon is alive. A server may have carried out a claim of a dead one after
        it was looked for what that had run.
        """
        self._queue.beat()
        if self._queue.shared:
            self._take_back()

    def _quick_check(self) -> None:
        found = self._database.quick_check()
        if found:
            log.critical("the database file is damaged: %s; restore it from a backup", found)
            self._keep_node = True
            self.fail(DAMAGED)

    def _open_doors(self) -> None:
        listen = self.settings.listen
        given = [sock for socks in systemd.listen_fds().values() for sock in socks]
        found = [(sock, Place(None)) for sock in given]
        if not any(sock.family == socket.AF_UNIX for sock in given):
            found.append(bind_unix(Path(self.socket_path), self.settings.paths.socket_chmod))
        if listen.tcp is not None:
            found.append(bind_tcp(listen.tcp.host, listen.tcp.port))
        self._lobby = Lobby(self._intake, self._dispatcher)
        self._doors = [Door(sock, self._lobby, listen, place) for sock, place in found]

    # The daemon's own threads

    def _faults(self, settings: Settings) -> list[str]:
        """What a configuration asks for that cannot be had, though it is right."""
        return [*faults_of(settings, self._types), *self._types.loose()]

    def _start_role(self, name: str, run: Callable[[], None]) -> None:
        threading.Thread(target=self._guard, args=(name, run), name=name, daemon=True).start()

    def _guard(self, name: str, run: Callable[[], None]) -> None:
        """Run a role; when it fails, again with growing pauses, and give up in the end."""
        failures = 0
        while failures < ROLE_FAILURES:
            began_s = time.monotonic()
            try:
                run()
                return
            except Exception:
                log.exception("%s failed", name)
            failures = failures + 1 if time.monotonic() - began_s < 60 else 1
            time.sleep(0.1 * 2**failures)
        log.critical("%s failed %d times: the daemon stops", name, ROLE_FAILURES)
        self.fail()

    def fail(self, exit_status: int = 70) -> None:
        """Stop, with a status by which the service manager starts the daemon again, or not."""
        self.exit_status = exit_status
        os.write(self._wake_w, bytes([signal.SIGTERM]))

    def _abandon(self, plugin: UpqJob) -> None:
        """Give up a job whose thread does not come back; with too many of them, ourselves."""
        pool = self._claimer.pool(plugin.jobname, plugin.token)
        job = pool.abandon(plugin.token) if pool else None
        if job is None:
            return
        many, limit = self._runner.threads.abandon(), self.settings.daemon.max_abandoned
        # Not in the keeper's thread: while the database is away, an end may have to wait for it.
        declaring = threading.Thread(
            target=self._runner.declare, args=(job, plugin), name="declare", daemon=True
        )
        declaring.start()
        self._declaring = [*filter(threading.Thread.is_alive, self._declaring), declaring]
        if many == limit + 1:
            log.critical("%d threads hang, more than [daemon] max_abandoned: restarting", many)
            self.fail()

    def _tick(self) -> None:
        while not self._stopped.wait(self._clock.tick()):
            pass

    def _purge(self) -> None:
        self._retention.step(self._stopped.wait)

    def _purge_slots(self) -> None:
        self._slots.purge(when.now() - SLOTS_KEPT_S * 1_000_000)

    def _tend_health(self) -> None:
        self._queue.tend_health(self._types.told_in_groups())

    def _feed_watchdog(self, interval_s: float) -> None:
        """Not a chore: chores wait for a database that may be slow."""
        wait_s = interval_s
        while not self._stopped.wait(wait_s):
            wait_s = interval_s if self._ping_watchdog() else min(interval_s, 1.0)

    def _ping_watchdog(self) -> bool:
        """Tell systemd that we live: the claimer has come round since we told it last, and clients
        are heard.
        """
        deaf_s = time.monotonic() - self._lobby.ticked_s
        lives = self._claimer.ticked_s >= self._told_s and deaf_s < DEAF_S
        if lives:
            systemd.notify("WATCHDOG=1")
            self._told_s = time.monotonic()
            self._claimer.wake()
        return lives

    # Signals

    def run(self) -> None:
        """Serve until TERM or INT. HUP and USR1 reload, USR2 tells every thread's stack."""
        while True:
            signum = os.read(self._wake_r, 1)[0]
            if signum in (signal.SIGTERM, signal.SIGINT):
                return
            if signum in (signal.SIGHUP, signal.SIGUSR1):
                try:
                    self.reload()
                except Refused:
                    continue  # the log has all of it
                except Exception as error:
                    log.error("not reloaded: %s", error)
            elif signum == signal.SIGUSR2:
                faulthandler.dump_traceback()

    def catch_signals(self) -> None:
        """Handlers only note the signal; the main thread reads it from a pipe."""
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        for name in ("TERM", "INT", "HUP", "USR1", "USR2"):
            signal.signal(signal.Signals[f"SIG{name}"], lambda *_: None)

    def reload(self) -> dict[str, Any]:
        """Read the configuration again; with faults in it the old one stays, and Refused says so.

        Returns what has changed, and warnings: what takes effect only after a restart among them.
        """
        with self._reloading:
            systemd.notify_reloading()
            try:
                settings = self._load()
                set_up_log(settings)
            except StartError as error:
                for fault in str(error).splitlines():
                    log.error("not reloaded, the old configuration stays: %s", fault)
                raise Refused(f"the old configuration stays:\n{error}") from error
            finally:
                systemd.notify("READY=1")
            code = code_of(settings.paths.jobs_dir)
            changed = changes(self.settings, settings, self._code, code)
            later = changes(self._at_start, settings)
            self.settings, self._code = settings, code
            self._types.configure(settings)
            self._runner.renew()
            self._queue.vault.use(settings.db.keys)
            self._intake.configure(settings)
            self._retention.configure(settings)
            self._make_pools()
            self._scheduler.configure(settings.schedules)
            self._claimer.heat()
            warnings = [
                *settings.warnings,
                *(f"[job {kind.name}] is broken: {kind.fault}" for kind in self._types.broken()),
                *self._faults(settings),
                *(
                    f"[{c['section']}] {c['setting']} needs a restart"
                    for c in later
                    if c["restart"]
                ),
            ]
            for change in changed:
                log.info("reload: %s", change["text"])
            for warning in warnings:
                log.warning("%s", warning)
            log.info("reloaded %s", settings.file)
            return {"changes": changed, "warnings": warnings}

    # Stop

    def stop(self) -> None:
        """Drain, then interrupt; no job is lost and none that was interrupted loses an attempt."""
        for door in self._doors:
            # Clients of a socket that systemd keeps wait in its backlog for the next daemon.
            if door.outlives_us:
                door.close()
        systemd.notify("STOPPING=1")
        log.info("Shutting down socket server...")
        grace_s = self.settings.daemon.grace_s
        deadline_s = time.monotonic() + grace_s
        self._intake.stopping = True
        self._claimer.drain()
        self._wait_until(lambda: self._claimer.busy == 0, deadline_s)
        self._claimer.stop()
        self._claimer.close_pools()
        self._interrupt()
        stored_by_s = time.monotonic() + 2.0
        for declaring in self._declaring:
            declaring.join(max(stored_by_s - time.monotonic(), 0))
        # Clients that wait for these ends hear of them before they are hung up.
        self._claimer.flush(stored_by_s)
        for door in self._doors:
            door.close()
            door.hang_up()
        if not self._claimer.flush(stored_by_s):
            log.error("the database is away: ends of jobs are not stored, they will run again")
        self._stopped.set()
        self._scheduler.stop(2.0)
        if not self._keep_node:
            with contextlib.suppress(RequestError):
                self._queue.close()
        self._runner.close()
        self._lifeline.close()
        self._database.close()
        for fd in self._locks:
            os.close(fd)
        log.info("Good bye.")

    def _interrupt(self) -> None:
        """End what still runs: commands by TERM and KILL, threads by asking; give all back."""
        left = self._claimer.running()
        for job, plugin in left:
            log.info("(%s:%d) interrupted, it will run again", job.type, job.id)
            if plugin is not None:
                plugin.interrupted = True
                if isinstance(plugin, CommandJob | ProcessJob):
                    plugin.grace_s = LAST_GRACE_S
                plugin.cancel()
        if left:
            self._wait_until(lambda: self._claimer.busy == 0, time.monotonic() + LAST_GRACE_S + 0.5)
        for job, _ in self._claimer.running():
            self._runner.give_back(job, "interrupted")

    def _wait_until(self, done: Callable[[], bool], deadline_s: float) -> None:
        """Until done, the deadline, or a second TERM."""
        while not done() and time.monotonic() < deadline_s:
            told = select.select([self._wake_r], [], [], 0.02)[0]
            if told and os.read(self._wake_r, 1)[0] in (signal.SIGTERM, signal.SIGINT):
                return


def machine_id() -> str:
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
    return os.uname().nodename


def lock(path: Path, refusal: str) -> int:
    """Hold a lock file for life. Raises AlreadyRunning or CannotCreate."""
    try:
        return hold_file(str(path), refusal)
    except OSError as error:
        raise CannotCreate(f"{path}: {error.strerror}") from error


def set_up_log(settings: Settings) -> None:
    logging_ = settings.logging
    logfile = Path(logging_.logfile) if logging_.logfile else None
    try:
        if logfile is not None:
            logfile.parent.mkdir(parents=True, exist_ok=True)
        level, statements = logging_.loglevel, settings.db.debug
        logs.setup(level, logging_.logformat, logfile, statements=statements)
    except OSError as error:
        raise CannotCreate(f"[logging] logfile = {logfile}: {error.strerror}") from error
