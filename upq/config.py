"""`upq.cfg` to frozen settings; every fault is found in one pass and told with file and line.

`load` reads each section by its declarations and checks what the sections say of each other;
`describe()` and the reference page (`python -m upq.config`) come from the same declarations.
Nothing is created or opened for the daemon here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from upq import webhook as webhooks
from upq.access import unknown_principals
from upq.declaration import declared
from upq.errors import ConfigError
from upq.followers import check_followers, check_handed_on
from upq.gates import disk_sizes
from upq.ini import Ini
from upq.jobsection import read_job
from upq.jobsettings import JobSettings
from upq.kinds import NOT_YET, number
from upq.notify import NOTIFY, Service, parse_target, service_fault, shown_target
from upq.notify import Webhook as Hook
from upq.params import shown, suggest
from upq.sections import absolute, fill
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
    Settings,
    Webhook,
)
from upq.timetable import read_schedules
from upq.vault import read_keys

#: Bytes that the kernel allows the path of a UNIX socket.
SOCKET_LIMIT_BYTES = 107


def _pool(name: str, ini: Ini) -> PoolSettings:
    section = ini.sections[f"pool {name}"]
    if not re.fullmatch("[A-Za-z0-9_.-]{1,64}", name):
        ini.fault(section.place, f"pool {shown(name)} is not a name of letters, digits, _ . and -")
    pool = fill(PoolSettings, section.name, ini, name=name)
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
    sizes = disk_sizes({one.path for job in jobs.values() for one in job.min_free})
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
            if one.path in sizes and (fault := one.fault(sizes[one.path])):
                ini.fault(ini.place(section, "min_free"), f"min_free: {fault}")
    for name in node.pools or ():
        if name not in pools:
            ini.fault(ini.place("node", "pools"), f"pools: no [pool {name}]{suggest(name, pools)}")


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
        key: absolute(ini.folder, item.text)
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
    return replace(db, url=f"{scheme}{slashes}{absolute(ini.folder, file)}{mark}{query}")


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
    parts: dict[str, Any] = {name: fill(cls, name, ini) for name, cls in SECTIONS.items()}
    paths = parts["paths"] = _with_socket(parts["paths"], ini)
    parts["db"] = _with_keys(_with_file(parts["db"], paths.state_dir, ini), ini)
    modules = {module.stem for module in Path(paths.jobs_dir).glob("*.py")}
    _check_sections(ini)
    jobs = {name: read_job(name, modules, ini) for name in _named("job", ini)}
    pools = {name: _pool(name, ini) for name in _named("pool", ini)}
    tokens = _tokens(ini)
    _check_limits(jobs, tokens, parts["node"], pools, ini)
    schedules = read_schedules(_named("schedule", ini), jobs, ini)
    check_followers(jobs, ini)
    check_handed_on(jobs, ini)
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
