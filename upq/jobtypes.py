"""The job types of one configuration: each section with its class, or with why it has none."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from upq import when
from upq.access import Principals
from upq.command import Lifeline, command_type
from upq.config import JobSettings, Mail, Settings, Webhook
from upq.errors import BadParams, Broken, Disabled, Refused, RequestError, UnknownCommand
from upq.health import Rules
from upq.notify import NOTIFY, TARGET_URL
from upq.params import suggest
from upq.plugins import Desk, Loader, UpqJob, blame
from upq.queue import Lane

log = logging.getLogger(__name__)


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
    #: For a type that is not told of by each failure.
    rules: Rules | None = None

    @property
    def queue(self) -> str:
        return self.name

    @property
    def file(self) -> Path:
        """Where faults of its class are looked for."""
        module = sys.modules.get(self.cls.__module__) if self.cls else None
        return Path(getattr(module, "__file__", None) or self.name)

    @property
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
        if self.cfg.params is None:
            return dict(params)
        return self.cfg.params.check(params, self.cfg.secret)

    def at_run(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """jobdata for a run: as `accept`, but a chain may carry more than the type declares."""
        if self.cfg.params is None:
            return dict(data)
        declared = {name: data[name] for name in self.cfg.params.names if name in data}
        return {**data, **self.cfg.params.check(declared, self.cfg.secret)}

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
        try:
            verdict = job.check()
        except RequestError as error:
            return Refused(str(error))
        except BaseException as error:  # even a sys.exit()
            log.warning("check() raised", exc_info=error)
            return Refused(f"check() failed: {blame(error, self.file)}")
        return Refused(str(job.msgstr or "refused by check()")) if verdict is False else None

    def retry_wait_s(self, attempt: int) -> float:
        cfg = self.cfg
        return when.backoff(
            attempt, cfg.retry_delay_s, cfg.retry_backoff, cfg.retry_max_s, random.random()
        )


class JobTypes:
    """All types by name, as they are configured now. Any thread may ask."""

    def __init__(self, settings: Settings, lifeline: Lifeline | None = None) -> None:
        self._lifeline = lifeline
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
        self.by_name = {name: self._load(cfg) for name, cfg in sections.items()}

    def get(self, name: str) -> JobType:
        """Raises UnknownCommand with a suggestion."""
        found = self.by_name.get(name)
        if found is None:
            raise UnknownCommand(f"no job type {name[:64]}{suggest(name, self.by_name)}")
        return found

    def hold(self, lane: Lane) -> str:
        """Why no job of a lane can start now; "" when they can."""
        kind = self.by_name.get(lane.type)
        if kind is None:
            return f"no such job type: {lane.type}"
        if kind.fault is not None:
            return str(kind.fault)
        return f"queue {lane.queue} is paused" if lane.paused else ""

    def priority(self, name: str) -> int:
        """What a type's section says, for jobs that no submit has made."""
        kind = self.by_name.get(name)
        return kind.cfg.priority if kind else 0

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
        submitters = None if cfg.submit is None else Principals(cfg.submit)
        return JobType(name, cfg, cls, fault, MappingProxyType(jobcfg), submitters, rules_of(cfg))

    def rules(self) -> list[Rules]:
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
        return command_type(
            cfg.name,
            cfg.command,
            success_codes=cfg.success_codes,
            env=cfg.env,
            cwd=Path(cfg.cwd) if cfg.cwd else None,
            timeout_s=cfg.timeout_s,
            lifeline=self._lifeline,
        )


def rules_of(cfg: JobSettings) -> Rules | None:
    every, age, silence = (
        round(seconds * 1e6)
        for seconds in (cfg.notify_every_s, cfg.alert_queue_age_s, cfg.alert_no_success_s)
    )
    if cfg.notify_after == 1 and not (every or age or silence):
        return None
    return Rules(cfg.name, cfg.notify_fail, cfg.notify_after, every, age, silence)


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
