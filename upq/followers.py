"""Job types that follow each other: all are there, none comes to follow itself, and none shows what
was secret in the one before.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Mapping

from upq import workflow
from upq.ini import Ini
from upq.jobsettings import JobSettings
from upq.notify import NOTIFY
from upq.params import names_in, suggest


def check_followers(jobs: Mapping[str, JobSettings], ini: Ini) -> None:
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


def check_handed_on(jobs: Mapping[str, JobSettings], ini: Ini) -> None:
    """What is secret in a job is so in those that get its parameters: none may show it."""
    for job in jobs.values():
        for other in map(jobs.get, _heirs(job, jobs) if job.secret else ()):
            if other is None:
                continue
            for key, text in other.seen.items():
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
