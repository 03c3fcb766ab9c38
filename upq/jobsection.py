"""`[job <type>]` as a whole: what its settings say together has to make sense, and what they leave
to each other is filled in.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from upq import when
from upq.declaration import declared, key_of
from upq.ini import Ini, Section
from upq.job import REPLACE
from upq.jobsettings import COMMAND_ONLY, JobSettings
from upq.notify import NOTIFY
from upq.params import Param, ParamSpec, names_in, shown, suggest
from upq.protocol import VERBS
from upq.sections import absolute, fill, from_file

#: Settings of jobs' own that name a file with a secret in it.
OWN_SECRET_FILE = re.compile(r"(passw|secret|token|credential)[^_]*_file$")

#: Why `JobSettings.seen` may name no secret.
SEEN = {
    "queue": "a queue's name is shown to all",
    "serial": "the text of a turn is shown",
    "delay": "the time of a start is shown",
    "rate": "what a rate is per is shown",
}


def read_job(name: str, modules: set[str], ini: Ini) -> JobSettings:
    """The job type of a section. `modules`: what files there are in `jobs_dir`."""
    section = ini.sections[f"job {name}"]
    if name in VERBS:
        ini.fault(section.place, f"{name} is a verb of the protocol and cannot be a job type")
    elif not re.fullmatch("[a-z][a-z0-9_]{0,63}", name):
        ini.fault(section.place, f"job type {shown(name)} is not a-z, then a-z, 0-9 and _")
    _read_own_secrets(section, ini)
    job = fill(
        JobSettings,
        section.name,
        ini,
        name=name,
        file=section.place.file,
        line=section.place.line,
        variables={key: item.text for key, item in section.items.items()},
        missing="command" not in section.items and name not in modules,
    )
    if job.missing and job.enabled:
        ini.warn(section.place, f"[job {name}] is disabled: no {name}.py in jobs_dir")
    if job.command and "executor" in job.variables:
        ini.fault(ini.place(section.name, "executor"), "executor: a command is a process anyway")
    _check_telling(job, ini)
    return _with_params(_with_retries(job, ini), ini)


def _read_own_secrets(section: Section, ini: Ini) -> None:
    """`eu_password` from the file that `eu_password_file` names, where a job has such settings.

    What such a name means is up to the job: a file that cannot be read is no fault.
    """
    for key in filter(OWN_SECRET_FILE.search, list(section.items)):
        name, pointer = key.removesuffix("_file"), section.items[key]
        if name in section.items or name in declared(JobSettings):
            continue
        try:
            section.items[name] = from_file(pointer, ini.folder)
        except ValueError as error:
            ini.warn(pointer.place, f"{key}: {error}")


def _check_telling(job: JobSettings, ini: Ini) -> None:
    """Settings that say when `notify_fail` is told, with nobody to tell."""
    keys = ("notify_after", "notify_every", "alert_queue_age", "alert_no_success")
    for key in filter(job.variables.get, keys):
        place = ini.place(f"job {job.name}", key)
        if job.name == NOTIFY:
            ini.fault(place, f"{key}: a notification tells nobody of itself")
        elif all(target.startswith("retry") for target in job.notify_fail):
            ini.fault(place, f"{key}: nobody to tell, notify_fail is empty")


def _with_retries(job: JobSettings, ini: Ini) -> JobSettings:
    """`retry:3` and `retrywait:3|1h` mean retries after one and the same wait."""
    section = f"job {job.name}"
    if any(target.startswith("retry") for target in job.notify_success):
        ini.fault(ini.place(section, "notify_success"), "notify_success: retry is for failures")
    asked: dict[str, Any] = {}
    for kind, _, rest in (target.partition(":") for target in job.notify_fail):
        if kind.startswith("retry"):
            count, _, wait = rest.partition("|")
            wait_s = when.duration(wait or "0")
            asked = {"retries": int(count), "retry_delay_s": wait_s, "retry_backoff": 1.0}
    asked = {name: value for name, value in asked.items() if key_of(name) not in job.variables}
    told = tuple(target for target in job.notify_fail if not target.startswith("retry"))
    return replace(job, notify_fail=told, **asked)


def _with_params(job: JobSettings, ini: Ini) -> JobSettings:
    """Without `params` a command takes its placeholders; no other name may be used anywhere."""
    used = [(key, name) for key, text in _templates(job) for name in names_in(text)]
    if job.command and not job.variables.get("params"):
        paths = names_in(job.cwd) if job.cwd.startswith("{") else []
        names_ = dict.fromkeys(name for _, name in used)
        found = [Param(name, "path" if name in paths[:1] else "str") for name in names_]
        job = replace(job, params=ParamSpec(tuple(found)))
    if job.params:
        names = job.params.names
        used += [(key, name) for key, text in job.seen.items() for name in names_in(text)]
        used += [("unique", name) for name in (job.unique and job.unique.names) or ()]
        for key, name in used + [("secret", name) for name in job.secret]:
            if name not in names:
                place = ini.place(f"job {job.name}", key)
                ini.fault(place, f"{key}: no parameter {shown(name)}{suggest(name, names)}")
    for key, text in job.seen.items():
        for name in sorted(job.secret & set(names_in(text))):
            place = ini.place(f"job {job.name}", key)
            ini.fault(place, f"{key}: {name} is secret, and {SEEN[key]}")
    if job.rate and job.rate.per:
        _check_pace(job, ini)
    for name in sorted(job.secret.intersection(names_in(" ".join(job.command or ())))):
        place = ini.place(f"job {job.name}", "command")
        ini.warn(place, f"command: everyone on this machine can see {{{name}}} in `ps`")
    if job.unique and "db" in ini.sections and "key_file" in ini.sections["db"].items:
        names_of_key = job.secret if job.unique.names is None else job.unique.names
        for name in sorted(job.secret.intersection(names_of_key)):
            place = ini.place(f"job {job.name}", "unique")
            ini.warn(
                place, f"unique: a digest of {name} is stored, by which a short one is guessed"
            )
    return _with_command(job, ini)


def _check_pace(job: JobSettings, ini: Ini) -> None:
    """What may stand beside `rate ... per`."""
    place = ini.place(f"job {job.name}", "rate")
    if job.serial:
        ini.fault(place, "rate: per is not possible together with serial")
    if job.when_busy == REPLACE:
        ini.fault(place, "rate: per is not possible together with when_busy = replace")


def _templates(job: JobSettings) -> Iterator[tuple[str, str]]:
    """The texts of a command with {placeholders}, each with its key."""
    if job.command:
        yield from (("command", word) for word in job.command)
        yield "stdin", job.stdin
        yield from (("env", text) for text in job.env.values() if text)
        yield "cwd", job.cwd


def _with_command(job: JobSettings, ini: Ini) -> JobSettings:
    """What settings of a command say together has to make sense; its folder is absolute."""

    def fault(key: str, text: str) -> None:
        ini.fault(ini.place(f"job {job.name}", key), f"{key}: {text}")

    if not job.command:
        for key in COMMAND_ONLY & job.variables.keys():
            ini.warn(ini.place(f"job {job.name}", key), f"{key}: means nothing without command")
        return job
    codes = {key: getattr(job, key) for key in ("success_codes", "retry_codes", "abort_codes")}
    for (first, some), (key, others) in itertools.combinations(codes.items(), 2):
        if twice := sorted(set(some) & set(others)):
            fault(key, f"{twice[0]} is in {first}, too")
    if job.retry_codes and not job.retries:
        place = ini.place(f"job {job.name}", "retry_codes")
        ini.warn(place, "retry_codes: nothing is tried again, retries is 0")
    if job.progress_fd and job.progress == "stdout":
        fault("progress_fd", "progress = stdout is given, too")
    if job.ionice and not shutil.which("ionice"):
        fault("ionice", "there is no program ionice (util-linux) on this machine")
    types = {param.name: param.type for param in job.params.params} if job.params else {}
    if job.stdin in types:
        fault("stdin", f"write {{{job.stdin}}} for the value of the parameter")
    first = names_in(job.cwd)[0] if job.cwd.startswith("{") and names_in(job.cwd) else ""
    if types.get(first, "path") != "path":
        fault("cwd", f"begins with {{{first}}}, which has to be a path: params = {first}:path")
    return replace(job, cwd=job.cwd if first else absolute(ini.folder, job.cwd))
