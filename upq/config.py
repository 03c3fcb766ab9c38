"""`upq.cfg` to frozen settings; every fault is found in one pass and told with file and line.

`load` reads each section by its declarations and checks what the sections say of each other;
`describe()` and the reference page (`python -m upq.config`) come from the same declarations.
Nothing is created or opened for the daemon here.
"""

from __future__ import annotations

import graphlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from upq import webhook as webhooks
from upq import when, workflow
from upq.access import unknown_principals
from upq.declaration import declared, key_of
from upq.errors import ConfigError, RequestError
from upq.ini import Ini, Item, Place, Section
from upq.job import REPLACE
from upq.jobsettings import COMMAND_ONLY, JobSettings
from upq.kinds import NOT_YET, PATH, number
from upq.notify import NOTIFY, Service, parse_target, service_fault, shown_target
from upq.notify import Webhook as Hook
from upq.params import Param, ParamSpec, names_in, shown, suggest
from upq.protocol import SUBMIT, VERBS, Request, parse
from upq.settings import (
    LATER,
    NAMED,
    OTHER_SECTIONS,
    SECTIONS,
    Access,
    Db,
    Node,
    Paths,
    PoolSettings,
    ScheduleSettings,
    Settings,
    Webhook,
)
from upq.vault import read_keys

#: Settings of jobs' own that name a file with a secret in it.
OWN_SECRET_FILE = re.compile(r"(passw|secret|token|credential)[^_]*_file$")

#: Bytes that the kernel allows the path of a UNIX socket.
SOCKET_LIMIT_BYTES = 107


# The checks

S = TypeVar("S")


def _fill(cls: type[S], section: str, ini: Ini, /, **more: Any) -> S:
    """An object of a section's class from its items; what cannot be read keeps its default."""
    values = more
    items = dict(ini.sections[section].items)
    known = declared(cls)
    for key, each in known.items():
        item = items.pop(key, None)
        pointer = items.pop(f"{key}_file", None) if each.secret else None
        if pointer and item:
            ini.fault(pointer.place, f"{key}_file: {key} is given, too")
        elif pointer:
            item = _from_file(pointer, key, ini)
        try:
            text = item.text if item and item.text else each.default
            value = each.kind.read(text) if text else each.kind.empty
            values[each.name] = _absolute(ini.folder, value) if each.kind is PATH else value
        except ValueError as error:
            assert item  # a default can be read: its declaration did
            ini.fault(item.place, f"{key}: {error}{_slip(item.text)}")
    for key, item in items.items():
        _judge_other(key, item.place, section, list(known), ini)
    return cls(**values)


def _absolute(folder: str, path: str) -> str:
    return os.path.normpath(os.path.join(folder, path)) if path else ""


def _slip(text: str) -> str:
    if "\n" in text:
        return " (an indented line goes on with the one above)"
    return " (a comment needs a line of its own)" if re.search(r"\s[#;]", text) else ""


def _from_file(pointer: Item, key: str, ini: Ini) -> Item | None:
    try:
        return Item(Path(ini.folder, pointer.text).read_text("utf-8").strip(), pointer.place)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        ini.fault(pointer.place, f"{key}_file: {pointer.text}: {why}")
        return None


def _judge_other(key: str, place: Place, section: str, known: list[str], ini: Ini) -> None:
    """Say what is wrong with a name that is not declared, if anything is."""
    kind = section.partition(" ")[0]
    if key in LATER.get(kind, ()):
        ini.fault(place, f"{key}: {NOT_YET}")
    elif kind not in ("job", "paths"):
        ini.fault(place, f"no setting {shown(key)} in [{section}]{suggest(key, known)}")
    elif near := [name for name in known if _one_slip(key, name)]:
        ini.warn(place, f"{key}: taken as the job's own name; did you mean {near[0]}?")


def _one_slip(word: str, other: str) -> bool:
    """Whether one letter more, less, other or swapped with its neighbour makes the other word."""
    differ = (at for at, pair in enumerate(zip(word, other, strict=False)) if pair[0] != pair[1])
    start = next(differ, min(len(word), len(other)))
    a, b = word[start:], other[start:]
    swapped = a[:2] == b[:2][::-1] and a[2:] == b[2:]
    return len(other) > 3 and (swapped or a[1:] == b[1:] or a[1:] == b or a == b[1:])


def _job(name: str, modules: set[str], ini: Ini) -> JobSettings:
    section = ini.sections[f"job {name}"]
    if name in VERBS:
        ini.fault(section.place, f"{name} is a verb of the protocol and cannot be a job type")
    elif not re.fullmatch("[a-z][a-z0-9_]{0,63}", name):
        ini.fault(section.place, f"job type {shown(name)} is not a-z, then a-z, 0-9 and _")
    _read_own_secrets(section, ini)
    job = _fill(
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
            text = Path(ini.folder, pointer.text).read_text("utf-8").strip()
            section.items[name] = Item(text, pointer.place)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
            ini.warn(pointer.place, f"{key}: {pointer.text}: {why}")


def _check_telling(job: JobSettings, ini: Ini) -> None:
    """Settings that say when `notify_fail` is told, with nobody to tell."""
    keys = ("notify_after", "notify_every", "alert_queue_age", "alert_no_success")
    for key in filter(job.variables.get, keys):
        place = ini.place(f"job {job.name}", key)
        if job.name == NOTIFY:
            ini.fault(place, f"{key}: a notification tells nobody of itself")
        elif all(target.startswith("retry") for target in job.notify_fail):
            ini.fault(place, f"{key}: nobody to tell, notify_fail is empty")


def _check_urls(
    jobs: Mapping[str, JobSettings], webhook: Webhook, ini: Ini, thorough: bool
) -> None:
    """Whether targets that are URLs can be told, as far as that can be seen from here."""
    for job in jobs.values():
        for key in ("notify_fail", "notify_success"):
            place = ini.place(f"job {job.name}", key, f"{key}_file")
            for target in (one for one in getattr(job, key) if not one.startswith("retry")):
                parsed, fault = parse_target(target), ""
                if isinstance(parsed, Service):
                    fault = service_fault(parsed.url, try_it=thorough)
                elif isinstance(parsed, Hook):
                    fault = webhooks.forbidden_literal(parsed.url, webhook.allow)
                    fault = fault and f"{shown_target(target)}: {fault}"
                if fault:
                    ini.fault(place, f"{key}: {fault}")


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
        used += [("queue", name) for name in names_in(job.queue)]
        used += [("serial", name) for name in names_in(job.serial)]
        used += [("delay", name) for name in names_in(job.delay)]
        used += [("rate", name) for name in names_in(job.rate.per if job.rate else "")]
        used += [("unique", name) for name in (job.unique and job.unique.names) or ()]
        for key, name in used + [("secret", name) for name in job.secret]:
            if name not in names:
                place = ini.place(f"job {job.name}", key)
                ini.fault(place, f"{key}: no parameter {shown(name)}{suggest(name, names)}")
    for name in sorted(job.secret & set(names_in(job.queue))):
        place = ini.place(f"job {job.name}", "queue")
        ini.fault(place, f"queue: {name} is secret, and a queue's name is shown to all")
    for key, text, shown_ in (
        ("serial", job.serial, "the text of a turn"), ("delay", job.delay, "the time of a start"),
    ):  # fmt: skip
        for name in sorted(job.secret & set(names_in(text))):
            place = ini.place(f"job {job.name}", key)
            ini.fault(place, f"{key}: {name} is secret, and {shown_} is shown")
    if job.rate and job.rate.per:
        _check_pace(job, job.rate.per, ini)
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


def _check_pace(job: JobSettings, per: str, ini: Ini) -> None:
    """What `rate ... per` may name, and what may stand beside it."""
    place = ini.place(f"job {job.name}", "rate")
    for name in names_in(per):
        if name in job.secret:
            ini.fault(place, f"rate: {name} is secret, and what a rate is per is shown")
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
    return replace(job, cwd=job.cwd if first else _absolute(ini.folder, job.cwd))


def _pool(name: str, ini: Ini) -> PoolSettings:
    section = ini.sections[f"pool {name}"]
    if not re.fullmatch("[A-Za-z0-9_.-]{1,64}", name):
        ini.fault(section.place, f"pool {shown(name)} is not a name of letters, digits, _ . and -")
    pool = _fill(PoolSettings, section.name, ini, name=name)
    queues = section.items.get("queues")
    if queues is None or not queues.text.strip():
        ini.fault(section.place, f"[pool {name}] has no queues")
    if pool.by_weight and pool.ageing_s:
        place = ini.place(section.name, "ageing")
        ini.fault(place, "ageing: is for queues in order; with weights none of them waits for ever")
    if 0 < pool.ageing_s < 1:
        ini.fault(ini.place(section.name, "ageing"), "ageing: has to be 1 s or more")
    return pool


def _tokens(ini: Ini) -> dict[str, int]:
    found = {}
    for name, item in ini.sections["tokens"].items.items():
        try:
            if not re.fullmatch("[a-z][a-z0-9_]{0,31}", name):
                raise ValueError("is not a name of a-z, 0-9 and _")
            found[name] = number(1).read(item.text)
        except ValueError as error:
            ini.fault(item.place, f"{name}: {error}")
    return found


def _check_limits(
    jobs: Mapping[str, JobSettings], tokens: Mapping[str, int], node: Node,
    pools: Mapping[str, PoolSettings], ini: Ini,
) -> None:  # fmt: skip
    """What can never be met, and names that stand for nothing."""
    for job in jobs.values():
        section = f"job {job.name}"
        place = ini.place(section, "needs")
        for name, n in job.needs.items():
            if name not in tokens:
                ini.fault(place, f"needs: no {name} in [tokens]{suggest(name, tokens)}")
            elif n > tokens[name]:
                has = f"[tokens] {name} = {tokens[name]}"
                ini.fault(place, f"needs: {name}:{n} can never be met, {has}")
        for one in job.min_free:
            if fault := one.fault():
                ini.fault(ini.place(section, "min_free"), f"min_free: {fault}")
    for name in node.pools or ():
        if name not in pools:
            ini.fault(ini.place("node", "pools"), f"pools: no [pool {name}]{suggest(name, pools)}")


def _check_followers(jobs: Mapping[str, JobSettings], ini: Ini) -> None:
    """Types that follow others have to be there, and none may come to follow itself."""
    #: Of each type those that follow, each with the setting that says so.
    graph: dict[str, dict[str, str]] = {}
    for job in jobs.values():
        graph[job.name] = {}
        following = ("on_fail", job.on_fail), ("on_done", job.on_done)
        for key, names in (*following, ("subjobs", workflow.names(job.subjobs))):
            graph[job.name] |= dict.fromkeys(names, key)
            place = ini.place(f"job {job.name}", key)
            if any(set(name) & set("()") for name in names):
                ini.fault(place, f"{key}: each follows for itself; groups ( ) are for subjobs")
                continue
            for name in names:
                if name not in jobs:
                    ini.fault(place, f"{key}: no section [job {name}]{suggest(name, jobs)}")
                elif name == NOTIFY:
                    ini.fault(place, f"{key}: notify is queued by upq itself")
                elif job.enabled and not jobs[name].enabled:
                    ini.warn(place, f"{key}: [job {name}] is not enabled")
    while circle := _circle(graph):
        key = graph[circle[0]].pop(circle[1])
        place = ini.place(f"job {circle[0]}", key)
        ini.fault(place, f"{key}: go round: {' -> '.join(circle)}")


def _check_handed_on(jobs: Mapping[str, JobSettings], ini: Ini) -> None:
    """What is secret in a job is so in those that get its parameters: none may show it."""
    for job in jobs.values():
        for other in map(jobs.get, _heirs(job, jobs) if job.secret else ()):
            if other is None:
                continue
            per = other.rate.per if other.rate else ""
            for key, text in (
                ("queue", other.queue), ("serial", other.serial), ("delay", other.delay),
                ("rate", per),
            ):  # fmt: skip
                for name in sorted((job.secret - other.secret) & set(names_in(text))):
                    place = ini.place(f"job {other.name}", key)
                    ini.fault(place, f"{key}: {name} is secret in [job {job.name}], which hands it"
                              " on, and would be shown")  # fmt: skip


def _heirs(job: JobSettings, jobs: Mapping[str, JobSettings]) -> set[str]:
    """The types that get the parameters of a job, by its subjobs and by `on_done`."""
    found: set[str] = set()
    # Steps bring no subjobs of their own.
    steps, left = set(workflow.names(job.subjobs)), [*job.on_done]
    for name in steps & jobs.keys():
        left += jobs[name].on_done
    while left:
        if (name := left.pop()) not in found and name in jobs:
            found.add(name)
            left += [*workflow.names(jobs[name].subjobs), *jobs[name].on_done]
    return found | steps


def _circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def _schedules(
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
    made = _fill(ScheduleSettings, section.name, ini, name=name, place=str(section.place))
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


def _warn_of_silence(jobs: Mapping[str, JobSettings], modules: set[str], ini: Ini) -> None:
    """Notifications are jobs of a type of their own, which needs no section."""
    if jobs[NOTIFY].enabled if NOTIFY in jobs else NOTIFY in modules:
        return
    for job in jobs.values():
        if job.enabled and (job.notify_fail or job.notify_success):
            place = ini.place(f"job {job.name}", "notify_fail", "notify_success")
            ini.warn(place, f"nobody is told: no job type {NOTIFY} is enabled")


def _warn_of_strangers(access: Access, jobs: Mapping[str, JobSettings], ini: Ini) -> None:
    lists = [("access", key, getattr(access, key)) for key in declared(Access)]
    lists += [(f"job {job.name}", "submit", job.submit or ()) for job in jobs.values()]
    for section, key, names in lists:
        for name in unknown_principals(names):
            ini.warn(ini.place(section, key), f"{key}: {name} is not known on this machine")


def _named(kind: str, ini: Ini) -> Iterator[str]:
    """The names of all sections of a kind."""
    for name in ini.sections:
        this, _, rest = name.partition(" ")
        if this == kind and rest:
            yield rest


def _check_sections(ini: Ini) -> None:
    """Say of which sections nothing is known."""
    for name, section in ini.sections.items():
        kind, _, rest = name.partition(" ")
        if kind in NAMED:
            if not rest:
                ini.fault(section.place, f"[{kind}] needs a {NAMED[kind]}")
        elif kind in LATER[""]:
            ini.fault(section.place, f"[{name}]: {NOT_YET}")
        elif name not in SECTIONS and name != "tokens":
            ini.fault(section.place, f"no section [{name}]{suggest(kind, (*SECTIONS, *NAMED))}")


def _with_socket(paths: Paths, ini: Ini) -> Paths:
    """Paths whole: the socket in its place, and the jobs' own names."""
    path = paths.socket or f"{paths.state_dir}/upq.sock"
    if len(os.fsencode(path)) > SOCKET_LIMIT_BYTES:
        place = ini.place("paths", "socket", "state_dir")
        ini.fault(place, f"socket: {path} is longer than {SOCKET_LIMIT_BYTES} bytes")
    others = {
        key: _absolute(ini.folder, item.text)
        for key, item in ini.sections["paths"].items.items()
        if key not in declared(Paths)
    }
    return replace(paths, socket=path, others=others)


def _with_file(db: Db, state_dir: str, ini: Ini) -> Db:
    """The URL of SQLite with an absolute path."""
    scheme, slashes, file = (db.url or f"sqlite:///{state_dir}/upq.db").partition(":///")
    if scheme != "sqlite":
        return db
    file, mark, query = file.partition("?")
    return replace(db, url=f"{scheme}{slashes}{_absolute(ini.folder, file)}{mark}{query}")


def _with_keys(db: Db, ini: Ini) -> Db:
    if not db.key_file:
        return db
    try:
        return replace(db, keys=read_keys(db.key_file))
    except ValueError as error:
        ini.fault(ini.place("db", "key_file"), f"key_file: {error}")
        return db


def load(
    path: str | os.PathLike[str],
    env: Mapping[str, str] = os.environ,
    *,
    thorough: bool = False,
) -> Settings:
    """The settings of a file, with `upq.d/*.cfg` beside it. Raises ConfigError with every fault.

    thorough: have the notification library look at its URLs, which takes a moment.
    """
    ini = Ini(os.fspath(path), env, (*SECTIONS, "tokens"))
    parts: dict[str, Any] = {name: _fill(cls, name, ini) for name, cls in SECTIONS.items()}
    paths = parts["paths"] = _with_socket(parts["paths"], ini)
    parts["db"] = _with_keys(_with_file(parts["db"], paths.state_dir, ini), ini)
    modules = {module.stem for module in Path(paths.jobs_dir).glob("*.py")}
    _check_sections(ini)
    jobs = {name: _job(name, modules, ini) for name in _named("job", ini)}
    pools = {name: _pool(name, ini) for name in _named("pool", ini)}
    tokens = _tokens(ini)
    _check_limits(jobs, tokens, parts["node"], pools, ini)
    schedules = _schedules(_named("schedule", ini), jobs, ini)
    _check_followers(jobs, ini)
    _check_handed_on(jobs, ini)
    _check_urls(jobs, parts["webhook"], ini, thorough)
    _warn_of_silence(jobs, modules, ini)
    _warn_of_strangers(parts["access"], jobs, ini)
    if ini.faults:
        raise ConfigError(ini.faults)
    file, *included = map(os.path.abspath, ini.files)
    texts = {
        section.name: {key: item.text for key, item in section.items.items() if item.text}
        for section in ini.sections.values()
    }
    for name, cls in SECTIONS.items():
        for key, each in declared(cls).items():
            # What a file holds, which the section only names.
            if each.secret and texts[name].pop(f"{key}_file", ""):
                texts[name][key] = getattr(parts[name], each.name)
    return Settings(
        file,
        (file, *included),
        ini.warnings,
        jobs=jobs,
        pools=pools,
        tokens=tokens,
        schedules=schedules,
        texts=texts,
        **parts,
    )


# The reference


INTRODUCTION = """\
# The configuration

<!-- made by `python -m upq.config`; change upq/settings.py or upq/jobsettings.py instead -->

`upq.cfg` is an ini file: `[section]`, `key = value`, comments on lines of their own that begin
with `#` or `;`, an indented line goes on with the value above. `upq.py --check` tells every fault
with file and line; `upq.py --settings` prints all settings, one a line.

* An empty value means the default.
* Relative paths start at the folder of the file. `upq.d/*.cfg` beside it is read, too.
* `${NAME}` in a value is the environment's NAME; write `$${NAME}` for the text itself.
  A variable `UPQ_DB__URL` or `UPQ_JOB_HASH__CONCURRENT` wins over the file.
* `password_file`, `url_file`, `secret_file` of `[webhook]`, `notify_fail_file` and
  `notify_success_file` name a file that holds the secret. So do settings of a job's own: with
  `eu_password_file` it finds what the file holds as `eu_password`.
* Durations: `30s`, `10m`, `1h30m`, `2d`, `1w`; a plain number is seconds. Sizes: `512K`, `20M`.
"""


def reference() -> str:
    """The reference page, docs/configuration.md."""
    lines = [INTRODUCTION]
    for name, section in (*SECTIONS.items(), *OTHER_SECTIONS.items()):
        about = " ".join((section.__doc__ or "").split())
        lines += [f"## `[{name}]`\n", f"{about}\n"]
        if not declared(section):
            continue
        lines += ["| key | type | default | unit | meaning |"]
        lines.append("|---|---|---|---|---|")
        for key, each in declared(section).items():
            default = f"`{each.default}`" if each.default else ""
            cells = (f"`{key}`", each.kind.name, default, each.kind.unit, each.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    later = [f"`[{name}]`" for name in LATER[""]]
    later += [f"`{key}` in `[{kind}]`" for kind, keys in LATER.items() if kind for key in keys]
    return "\n".join([*lines, f"Reserved, {NOT_YET}: {', '.join(later)}.", ""])


def describe() -> str:
    """Every setting on one line, as `upq --settings` prints them."""
    return "\n".join(
        f"[{name.partition(' ')[0]}] {key} = {each.default}  ({each.kind.name}) {each.meaning}"
        for name, section in (*SECTIONS.items(), *OTHER_SECTIONS.items())
        for key, each in declared(section).items()
    )


if __name__ == "__main__":
    print(reference(), end="")
