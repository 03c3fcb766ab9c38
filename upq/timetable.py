"""The schedules of `upq.cfg`: what each of them submits, which its type has to take, and when."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from upq import when
from upq.errors import RequestError
from upq.ini import Ini, Place
from upq.jobsettings import JobSettings
from upq.notify import NOTIFY
from upq.params import shown, suggest
from upq.protocol import SUBMIT, Request, parse
from upq.sections import fill
from upq.settings import ScheduleSettings


def read_schedules(
    names: Iterable[str], jobs: Mapping[str, JobSettings], ini: Ini
) -> dict[str, ScheduleSettings]:
    """Sections, and `schedule =` of job types, which have the name of the type."""
    made = {name: _schedule(name, jobs, ini) for name in names}
    for job in jobs.values():
        if job.schedule is None:
            continue
        place = ini.place(f"job {job.name}", "schedule")
        if job.name in made:
            ini.fault(place, f"schedule: there is [schedule {job.name}], too")
            continue
        made[job.name] = ScheduleSettings(
            job.name,
            str(place),
            job.name,
            request=Request(SUBMIT, job.name, {}),
            times=job.schedule,
        )
        _check_scheduled(made[job.name], jobs, place, "schedule", ini)
    return made


def _schedule(name: str, jobs: Mapping[str, JobSettings], ini: Ini) -> ScheduleSettings:
    section = ini.sections[f"schedule {name}"]
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        ini.fault(section.place, f"schedule {shown(name)} is not letters, digits, '_', '.' and '-'")
    made = fill(ScheduleSettings, section.name, ini, name=name, place=str(section.place))
    keys = [key for key in ("line", "type", "params") if getattr(made, key)]
    place = ini.place(section.name, *keys[-1:])
    if keys in ([], ["params"]):
        ini.fault(section.place, f"[{section.name}] needs type = <job type>, or a line")
    elif keys[0] == "line" and len(keys) > 1:
        ini.fault(place, f"line: has all that a submit has; {keys[1]} is given, too")
    elif request := _request(made, place, keys[-1], ini):
        made = replace(made, type=request.verb, request=request)
        _check_scheduled(made, jobs, place, keys[-1], ini)
    return _with_times(made, ini)


def _request(made: ScheduleSettings, place: Place, key: str, ini: Ini) -> Request | None:
    """What a schedule submits, or None and a fault."""
    try:
        request = parse((made.line or f"{made.type} {made.params}").encode())
    except RequestError as error:
        ini.fault(place, f"{key}: {error}")
        return None
    if request is None or request.kind != SUBMIT or (made.type and request.verb != made.type):
        ini.fault(place, f"{key}: {shown(made.line or made.type)} submits no job")
        return None
    for option in ("run_at", "key", "after"):
        if getattr(request.options, option) is not None:
            spelt = "@at" if option == "run_at" else f"@{option}"
            ini.fault(place, f"{key}: {spelt}: has no meaning for a job that comes again")
    options = request.options
    if options.expires_s and options.in_s and options.in_s >= options.expires_s:
        ini.fault(place, f"{key}: @expires: that is before the job may start (@in)")
    return request


def _check_scheduled(
    made: ScheduleSettings, jobs: Mapping[str, JobSettings], place: Place, key: str, ini: Ini
) -> None:
    """Fault a type that there is not and parameters that it does not take."""
    job = jobs.get(made.type)
    if job is None:
        ini.fault(place, f"{key}: no section [job {made.type}]{suggest(made.type, jobs)}")
        return
    if made.type == NOTIFY:
        ini.fault(place, f"{key}: notify is queued by upq itself")
    if not job.enabled or job.missing:
        ini.warn(place, f"{key}: [job {made.type}] is disabled: its jobs will wait")
    try:
        if job.params is not None:
            job.params.check(made.request.params, job.secret)
    except RequestError as error:
        ini.fault(place, f"{key}: {error}")


def _with_times(made: ScheduleSettings, ini: Ini) -> ScheduleSettings:
    section = f"schedule {made.name}"
    place = ini.place(section, "cron", "every")
    written = ini.sections[section].items
    if bool(made.cron) == ("every" in written):
        ini.fault(place, f"[{section}] needs either cron = 0 3 * * * or every = 10m")
        return made
    text = made.cron or f"every {written['every'].text}"
    try:
        return replace(made, times=when.Times.read(text, made.timezone))
    except ValueError as error:
        in_zone = made.timezone and "time zone" in str(error)
        key = "timezone" if in_zone else "cron" if made.cron else "every"
        ini.fault(ini.place(section, key), f"{key}: {error}")
        return made
