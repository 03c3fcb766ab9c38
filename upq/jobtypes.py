"""The job types of one configuration: each section with its class, or with why it has none."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from upq import health, spawn, when
from upq.access import Principals
from upq.attempt import refused
from upq.cgroup import GroupLimits, Groups
from upq.command import STDOUT, command_type
from upq.draws import Bounds, Level, Plan, Token
from upq.errors import BadParams, Broken, Disabled, Refused, RequestError, UnknownCommand
from upq.gates import Closed, watch_disks
from upq.job import QUEUE, REPLACE, Job, Lane, Limits, NewJob
from upq.jobsettings import JobSettings
from upq.loader import Loader, blame
from upq.notify import NOTIFY, TARGET_URL, secret_settings
from upq.params import ParamSpec, fill_key, names_in, queue_of, shown, suggest
from upq.plugins import Desk, UpqJob
from upq.protocol import VERBS
from upq.record import canonical, digest
from upq.secret import secret_texts
from upq.settings import Mail, PoolSettings, Settings, Webhook
from upq.trees import Lifeline
from upq.workflow import DELAY, LAST

log = logging.getLogger(__name__)

#: Numbers from 0 to 1 that are evenly spread however many are taken: each lies in the widest gap of
#: those before. What fails in the same second is then tried again in seconds of its own.
_GOLDEN = 0.6180339887498949
_steps = itertools.count(random.randrange(1 << 20))


@dataclass(frozen=True)
class JobType:
    """A job type as it is configured now."""

    name: str
    cfg: JobSettings
    #: None while the type cannot run; `fault` then says why.
    cls: type[UpqJob] | None
    fault: RequestError | None = None
    #: What the job sees as `self.jobcfg`.
    jobcfg: Mapping[str, str] = field(default_factory=dict)
    #: Who may submit it; None leaves it to [access].
    submitters: Principals | None = None
    #: What it takes: as `params` in its section says, else the annotations of its class.
    params: ParamSpec | None = None
    #: Names of params that are never shown, those of all types.
    secret: frozenset[str] = frozenset()
    #: Values of the section that are never shown.
    hidden: tuple[str, ...] = ()

    #: Whether its section sets limits to each of its jobs: `limits` says which.
    limited: bool = False
    #: How it is told of, if not by each failure.
    rules: health.Rules | None = None
    #: Where faults of its class are looked for.
    file: Path = Path()

    @property
    def queue(self) -> str:
        """The one queue of its jobs; "" when their parameters name it."""
        return "" if names_in(self.cfg.queue) else self.cfg.queue or self.name

    def queue_for(self, params: Mapping[str, Any]) -> str:
        """The queue of a job. Raises BadParams."""
        return queue_of(self.cfg.queue, params) if self.cfg.queue else self.name

    @cached_property
    def checks(self) -> bool:
        """Whether its class has a check() of its own."""
        return self.cls is not None and self.cls.check is not UpqJob.check

    def runnable(self) -> type[UpqJob]:
        """The class. Raises Disabled or Broken."""
        if self.cls is None:
            raise self.fault or Broken(self.name)
        return self.cls

    def accept(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The params as the job gets them. Raises BadParams."""
        if "subjobs" in params:
            raise BadParams("subjobs: what follows a job is said in upq.cfg, not in a submit")
        if self.params is None:
            return dict(params)
        return self.params.check(params, self.secret)

    def at_run(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """jobdata for a run: as `accept`, but a chain may carry more than the type declares.

        What a branch without a result hands on counts as not given.
        """
        if self.params is None:
            return dict(data)
        declared = {n: data[n] for n in self.params.names if data.get(n) is not None}
        return {**data, **self.params.check(declared, self.secret)}

    @cached_property
    def hides(self) -> bool:
        """Whether there is anything that must not be told of its jobs."""
        return bool(self.secret or self.hidden)

    def hidden_in(self, *datas: Any) -> list[str]:
        """Texts that nothing told of a job with this data may hold."""
        if not self.secret:
            return list(self.hidden)
        return [*secret_texts(datas, self.secret), *self.hidden]

    def limits(
        self,
        params: Mapping[str, Any],
        run_at: int | None = None,
        expires_s: float | None = None,
    ) -> Limits:
        """What a job is held to, submitted now with params as `accept` has left them.

        expires_s: from `@expires:`, 0 for never. Raises BadParams.
        """
        cfg, now = self.cfg, when.now()
        unique = ""
        if cfg.unique is not None:
            names = params if cfg.unique.names is None else cfg.unique.names
            unique = canonical({name: params[name] for name in names if name in params})
        expires_at = None
        if expires_s:
            expires_at = now + round(expires_s * 1e6)
            if run_at is not None and run_at >= expires_at:
                raise BadParams("@expires: that is before the job may start (@in, @at)")
        elif cfg.expires_s and expires_s is None:
            expires_at = max(now, run_at or now) + round(cfg.expires_s * 1e6)
        return Limits(
            unique,
            until_start=cfg.unique is not None and cfg.unique.until_start,
            unique_us=round(cfg.unique.for_s * 1e6) if cfg.unique is not None else 0,
            serial=self.turn_of(params),
            **self._pace(params),
            expires_at=expires_at,
            max_queue=cfg.max_queue,
            when_busy=cfg.when_busy,
        )

    def turn_of(self, params: Mapping[str, Any]) -> str:
        """The text of `serial` with these params, "" when there is none. Raises BadParams.

        Also when a rate asks for what is not given.
        """
        self._pace(params)
        return fill_key(self.cfg.serial, params) if self.cfg.serial else ""

    def put_off(self, new: NewJob) -> None:
        """Give a job the delay of its type. Raises BadParams."""
        text = fill_key(self.cfg.delay, new.params, "delay")
        try:
            delay_us = round(when.duration(text) * 1e6)
        except ValueError as error:
            raise BadParams(f"delay = {self.cfg.delay}: {error}") from None
        new.options[DELAY] = delay_us
        new.run_at = when.now() + delay_us

    def time_of(self, job: Job) -> None:
        """Raises BadParams for a job that no delay could be read for, when it first starts.

        One that is queued again starts at once, whatever time it was given before.
        """
        if self.cfg.delay and job.starts == 1 and DELAY not in job.options and job.run_at is None:
            self.put_off(NewJob(job.type, job.params))

    def _pace(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What `rate ... per` says for a job with these params. Raises BadParams."""
        rate = self.cfg.rate
        if rate is None or not rate.per:
            return {}
        paced = fill_key(rate.per, params, "rate", f"{rate.text} per {rate.per}")
        of = ", ".join(f"{name}={params[name]}" for name in names_in(rate.per))
        return {"paced": paced, "every_us": rate.every_us, "pace": f"rate {rate.text} of {of}"}

    def make(self, jobdata: dict[str, Any], desk: Desk | None = None, **facts: Any) -> UpqJob:
        """An object to check, or to check and run in this thread. Raises Disabled, Broken."""
        cls = self.runnable()
        facts.setdefault("chain", self.cfg.subjobs)
        limit = self.cfg.output_limit_bytes
        try:
            return cls(
                self.name, jobdata, self.jobcfg, desk=desk, output_limit_bytes=limit, **facts
            )
        except BaseException as error:  # an __init__ of the job's own
            raise Broken(blame(error, self.file)) from error

    def refusal(self, job: UpqJob) -> Refused | None:
        """Ask check(); an exception in it refuses, too."""
        return refused(job, self.file)

    def retry_wait_s(self, attempt: int) -> float:
        cfg = self.cfg
        return when.backoff(
            attempt,
            cfg.retry_delay_s,
            cfg.retry_backoff,
            cfg.retry_max_s,
            next(_steps) * _GOLDEN % 1,
        )


class JobTypes:
    """All types by name, as they are configured now. Any thread may ask."""

    def __init__(
        self, settings: Settings, lifeline: Lifeline | None = None, groups: Groups | None = None
    ) -> None:
        self._lifeline, self._groups = lifeline, groups
        #: Names of params that are never shown, whatever the type: a chain hands them on. Names of
        #: types that a reload has removed stay among them.
        self.secret: frozenset[str] = frozenset((TARGET_URL,))
        #: Replaced as a whole, never changed.
        self.by_name: dict[str, JobType] = {}
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Load every type anew; running jobs keep the classes they have."""
        self._loader = Loader(Path(settings.paths.jobs_dir))
        self._mail = settings.mail
        self._webhook = settings.webhook
        self._paths = settings.paths.others
        sections = dict(settings.jobs)
        if NOTIFY not in sections and self._loader.has(NOTIFY):
            sections[NOTIFY] = JobSettings(NOTIFY)
        self.secret |= {name for cfg in sections.values() for name in cfg.secret}
        watch_disks({one.path for cfg in sections.values() for one in cfg.min_free})
        self.rules = Rules(settings)
        self.by_name = {name: self._load(cfg) for name, cfg in sections.items()}

    def get(self, name: str) -> JobType:
        """Raises UnknownCommand with a suggestion."""
        found = self.by_name.get(name)
        if found is None:
            close = suggest(name, [*self.by_name, *VERBS])
            raise UnknownCommand(f"no job type {name[:64]}{close}")
        return found

    def hold(self, lane: Lane) -> str:
        """Why no job of a lane can start now; "" when they can."""
        kind = self.by_name.get(lane.type)
        if kind is None:
            return f"no such job type: {lane.type}"
        if kind.fault is not None:
            return str(kind.fault)
        if lane.paused:
            return f"queue {lane.queue} is paused"
        if elsewhere := self.rules.elsewhere(lane):
            return elsewhere
        closed = self.rules.gate(lane)
        return closed.reason if closed else ""

    def queue_of_step(self, name: str, data: Mapping[str, Any]) -> str:
        """The queue of a job that no submit has made; its type's own when it cannot be named."""
        kind = self.by_name.get(name)
        try:
            return kind.queue_for(data) if kind else name
        except BadParams as error:
            log.warning("%s goes to the queue %s: %s", name, name, error)
            return name

    def step(self, of: Job, name: str, params: dict[str, Any], options: dict[str, Any]) -> NewJob:
        """A job that the end of another calls for.

        One that lacks what its type asks for fails when it runs.
        """
        kind = self.by_name.get(name)
        if kind is not None and kind.params is not None:
            with contextlib.suppress(BadParams):
                params = kind.at_run(params)
        if options == LAST and kind is not None and not kind.cfg.subjobs:
            options = {}  # it says nothing that the type does not
        new = NewJob(name, params, self.queue_of_step(name, params), options={**options},
                     submitter=of.submitter, parent=of.id, root=of.root)  # fmt: skip
        if kind is not None:
            new.priority = kind.cfg.priority
            if kind.cfg.delay:
                with contextlib.suppress(BadParams):
                    kind.put_off(new)
        return new

    def limit(self, new: list[NewJob], expires_s: float | None = None) -> None:
        """Hold jobs that an end or a schedule calls for to the limits of their types.

        They are not refused, whatever waits already: the end would lose what follows it. One that
        lacks what `serial` or `rate` asks for fails when it runs. expires_s: from `@expires:` of a
        schedule.
        """
        for one in new:
            kind = self.by_name.get(one.type)
            if kind is not None and (kind.limited or expires_s is not None):
                try:
                    limits = kind.limits(one.params, one.run_at, expires_s)
                except BadParams:
                    continue
                busy = REPLACE if limits.when_busy == REPLACE else QUEUE
                one.limits = limits._replace(max_queue=0, when_busy=busy)

    def broken(self) -> list[JobType]:
        """Types that should run and cannot."""
        return [one for one in self.by_name.values() if isinstance(one.fault, Broken)]

    def _load(self, cfg: JobSettings) -> JobType:
        name = cfg.name
        jobcfg = {**self._paths, **cfg.variables}
        if name == NOTIFY:
            jobcfg |= mail_variables(self._mail) | webhook_variables(self._webhook)
            if "retries" not in cfg.variables:
                # For about four days.
                cfg = replace(cfg, retries=100, retry_delay_s=15.0, retry_max_s=3600.0)
        cls, fault = self._class_or_fault(cfg)
        params = cfg.params or (cls.declared if cls else None)
        unknown = sorted(cfg.secret - set(params.names)) if params else []
        if unknown and cfg.params is None:
            cls, fault = None, Broken(f"secret: no parameter {shown(unknown[0])}")
        submitters = None if cfg.submit is None else Principals(cfg.submit)
        limited = bool(
            cfg.unique or cfg.serial or cfg.expires_s or cfg.max_queue or cfg.when_busy != QUEUE
        ) or (cfg.rate is not None and cfg.rate.per != "")
        return JobType(
            name,
            cfg,
            cls,
            fault,
            MappingProxyType(jobcfg),
            submitters,
            params,
            # Only notify jobs have a target's URL, so that no other type has to be searched for it.
            self.secret if name == NOTIFY else self.secret - {TARGET_URL} | cfg.secret,
            tuple(secret_settings({k: v for k, v in jobcfg.items() if k not in self._paths})),
            limited=limited,
            rules=rules_of(cfg),
            file=file_of(cls, name),
        )

    def loose(self) -> list[str]:
        """Which limits do not hold here, and why."""
        groups = self._groups or Groups(None, why="no control groups are used")
        lacking = {
            kind.name: groups.lacking(group_limits(kind.cfg)) for kind in self.by_name.values()
        }
        return [
            f"[job {name}] {', '.join(settings)} cannot be held: {groups.why}"
            for name, settings in lacking.items()
            if settings
        ]

    def told_in_groups(self) -> list[health.Rules]:
        """Of all types that have any, and somebody to deliver what they ask for."""
        if self.by_name.get(NOTIFY) is None:
            return []
        return [kind.rules for kind in self.by_name.values() if kind.rules is not None]

    def _class_or_fault(self, cfg: JobSettings) -> tuple[type[UpqJob] | None, RequestError | None]:
        if not cfg.enabled:
            return None, Disabled(f"{cfg.name} is disabled: enabled = no")
        try:
            return self._class(cfg), None
        except Broken as error:
            if cfg.missing:
                return None, Disabled(f"{cfg.name} is disabled: {error}")
            return None, error

    def _class(self, cfg: JobSettings) -> type[UpqJob]:
        if cfg.command is None:
            return self._loader.load(cfg.name)
        free = ("int", "float", "choice")
        return command_type(
            cfg.name,
            cfg.command,
            free={p.name for p in cfg.params.params if p.type in free} if cfg.params else (),
            success_codes=frozenset(cfg.success_codes),
            retry_codes=frozenset(cfg.retry_codes),
            abort_codes=frozenset(cfg.abort_codes),
            env=cfg.env,
            cwd=cfg.cwd,
            stdin=cfg.stdin,
            limits=spawn.Limits(
                nice=cfg.nice,
                ionice=cfg.ionice,
                memory_bytes=cfg.memory_limit_bytes,
                cpu_s=cfg.cpu_limit_s,
                file_bytes=cfg.file_limit_bytes,
                open_files=cfg.open_files,
            ),
            group_limits=group_limits(cfg),
            groups=self._groups,
            progress_on=STDOUT if cfg.progress == "stdout" else cfg.progress_fd,
            json_result=cfg.result == "json",
            timeout_s=cfg.timeout_s,
            lifeline=self._lifeline,
        )


def group_limits(cfg: JobSettings) -> GroupLimits:
    return GroupLimits(cfg.memory_max_bytes, cfg.cpu_quota, cfg.tasks_max)


class Rules:
    """How one configuration orders and limits the claims."""

    def __init__(self, settings: Settings) -> None:
        self._node = settings.node.name
        self._pools = settings.pools_here
        self._elsewhere = {n: p for n, p in settings.pools.items() if n not in self._pools}
        self._gates = {name: cfg.gates for name, cfg in settings.jobs.items() if cfg.gates}
        self._bounds = bounds_of(settings)
        # By queue: its pool on this node, and else one that only others serve.
        self._found: dict[str, tuple[PoolSettings | None, str]] = {}
        self._plain = not self._pools and not self._bounds

    def _find(self, queue: str) -> tuple[PoolSettings | None, str]:
        found = self._found.get(queue)
        if found is None:
            here = (one for one in self._pools.values() if one.level(queue) is not None)
            there = (one for one in self._elsewhere.values() if one.level(queue) is not None)
            pool = next(here, None)
            other = None if pool else next(there, None)
            found = self._found[queue] = (pool, other.name if other else "")
        return found

    def elsewhere(self, lane: Lane) -> str:
        """Why a lane is not for this node; "" when it is."""
        if not self._elsewhere:
            return ""
        name = self._find(lane.queue)[1]
        if not name:
            return ""
        return f"queue {lane.queue} is of pool {name}, which {self._node} does not serve"

    def gate(self, lane: Lane) -> Closed | None:
        """The gate that keeps a lane's jobs from starting now."""
        gates = self._gates.get(lane.type)
        if gates is None:
            return None
        now = when.now()
        return next((closed for gate in gates if (closed := gate.closed(now))), None)

    def pool_of(self, lane: Lane) -> str:
        """The pool whose places are filled by draws; "" where a lane's type has its own."""
        if self._plain:
            return ""
        pool = self._find(lane.queue)[0]
        if pool is not None:
            return pool_key(pool.name)
        return lane.type if lane.type in self._bounds else ""

    def pool_name(self, lane: Lane) -> str:
        """The [pool] whose places the lane's jobs get; "" for those of their type."""
        pool = self._find(lane.queue)[0]
        return pool.name if pool else ""

    def named(self) -> dict[str, PoolSettings]:
        """The queues that pools of this node call by their whole names, each with its pool."""
        patterns = [one.text for pool in self._pools.values() for one in pool.queues]
        found = {name: self._find(name)[0] for name in patterns if "*" not in name}
        return {name: pool for name, pool in found.items() if pool}

    def plan(self, pool: str, lanes: Collection[Lane]) -> Plan:
        """In which order a pool draws from these of its lanes."""
        found = next((one for one in self._pools.values() if pool_key(one.name) == pool), None)
        if found is None:
            level = Level(pool, tuple((lane.id, lane.type) for lane in lanes))
            return Plan([level], self._bounds)
        sorted_in: dict[int, list[tuple[int, str]]] = {}
        for lane in lanes:
            depth = found.level(lane.queue)
            if depth is not None:
                sorted_in.setdefault(depth, []).append((lane.id, lane.type))
        levels = [
            Level(found.queues[n].text, tuple(sorted_in[n]), found.queues[n].weight)
            for n in sorted(sorted_in)
        ]
        if found.ageing_s:
            # Levels without jobs count, too: they are steps on the way up.
            levels = [
                Level(pattern.text, tuple(sorted_in.get(n, ())))
                for n, pattern in enumerate(found.queues)
            ]
        return Plan(levels, self._bounds, ageing_us=round(found.ageing_s * 1e6),
                    by_weight=found.by_weight)  # fmt: skip

    def order(self, pool: PoolSettings) -> Callable[[Job], Any] | None:
        """Where a job stands among those that were claimed ahead for a pool."""
        if pool.by_weight or pool.ageing_s:
            return None

        def place(job: Job) -> tuple[Any, ...]:
            level = pool.level(job.queue)  # None: claimed before a reload took its queue away
            return level is None, level or 0, job.rank, job.root, job.id

        return place

    def ahead_of(self, lane: Lane, lanes: Collection[Lane]) -> tuple[list[int], list[int]]:
        """Of these lanes, those whose jobs all go first, and those of the same level."""
        key, pool = self.pool_of(lane), self._find(lane.queue)[0]
        if pool is None:
            return [], [
                one.id for one in lanes if one.id == lane.id or key == self.pool_of(one) != ""
            ]
        depth = pool.level(lane.queue)
        mine = [one for one in lanes if self._find(one.queue)[0] is pool]
        levels = [(pool.level(one.queue), one.id) for one in mine]
        first = [id for at, id in levels if not pool.by_weight and (at or 0) < (depth or 0)]
        return first, [id for at, id in levels if at == depth]


def pool_key(name: str) -> str:
    """What a [pool] is called among the pools, most of which are of a type."""
    return f"pool {name}"


def bounds_of(settings: Settings) -> dict[str, Bounds]:
    """By type, of those that have any."""
    users: dict[str, dict[str, int]] = {}
    for cfg in settings.jobs.values():
        for name, n in cfg.needs.items():
            users.setdefault(name, {})[cfg.name] = n
    tokens = {
        name: Token(name, digest("token", name), settings.tokens[name], users[name])
        for name in users
    }
    rates = {cfg.name: cfg.rate for cfg in settings.jobs.values() if cfg.rate and not cfg.rate.per}
    return {
        cfg.name: Bounds(
            rates.get(cfg.name),
            # A rate that is changed starts anew.
            digest("rate", cfg.name, repr(cfg.rate)) if cfg.name in rates else "",
            tuple(tokens[name] for name in cfg.needs),
        )
        for cfg in settings.jobs.values()
        if cfg.name in rates or cfg.needs
    }


def rules_of(cfg: JobSettings) -> health.Rules | None:
    every, age, silence = (
        round(seconds * 1e6)
        for seconds in (cfg.notify_every_s, cfg.alert_queue_age_s, cfg.alert_no_success_s)
    )
    if cfg.notify_after == 1 and not (every or age or silence):
        return None
    return health.Rules(cfg.name, cfg.notify_fail, cfg.notify_after, every, age, silence)


def file_of(cls: type[UpqJob] | None, name: str) -> Path:
    """To be asked before a reload forgets the modules."""
    module = sys.modules.get(cls.__module__) if cls else None
    return Path(getattr(module, "__file__", None) or name)


def webhook_variables(webhook: Webhook) -> dict[str, str]:
    """[webhook] as `jobs/notify.py` reads it."""
    return {
        "webhook_secret": webhook.secret,
        "webhook_allow": " ".join(map(str, webhook.allow)),
        "webhook_timeout_s": str(webhook.timeout_s),
    }


def mail_variables(mail: Mail) -> dict[str, str]:
    """[mail] as `jobs/notify.py` reads it."""
    host = mail.server.host
    return {
        "mail_server": f"[{host}]:{mail.server.port}"
        if ":" in host
        else f"{host}:{mail.server.port}",
        "mail_from": mail.sender,
        "mail_tls": mail.tls,
        "mail_user": mail.user,
        "mail_password": mail.password,
        "mail_timeout_s": str(mail.timeout_s),
    }
