"""Reads an ini file, what it includes and what the environment changes, as text.

Each item knows its file and line; faults are gathered rather than raised, to be told in one go.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from upq.params import shown, suggest


class Place(NamedTuple):
    """Where something stands; sorts as it is read."""

    nth: int
    line: int
    file: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(slots=True)
class Item:
    text: str
    place: Place


@dataclass(slots=True)
class Section:
    name: str
    place: Place
    items: dict[str, Item] = field(default_factory=dict)


_VARIABLE = re.compile(r"\$(\$?)\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Ini:
    """The sections of a file and its includes as text, and all faults found in them so far.

    The grammar is that of configparser without `%` and inline comments, with lines kept.
    """

    def __init__(self, file: str, env: Mapping[str, str], always: Iterable[str]) -> None:
        """The sections called `always` are there even when no file has them."""
        self.file = file
        self.folder = os.path.dirname(os.path.abspath(file))
        included = sorted(glob.glob("upq.d/*.cfg", root_dir=self.folder))
        self.files = (file, *(os.path.join(os.path.dirname(file), name) for name in included))
        self.sections: dict[str, Section] = {}
        self._faults: list[tuple[Place, str]] = []
        self._warnings: list[tuple[Place, str]] = []
        for nth, name in enumerate(self.files):
            self._read(Place(nth, 1, name))
        for name in always:
            self.sections.setdefault(name, Section(name, Place(0, 1, file)))
        self._override(env)
        for section in self.sections.values():
            self._expand(section, env)

    def fault(self, place: Place, text: str) -> None:
        self._faults.append((place, text))

    def warn(self, place: Place, text: str) -> None:
        self._warnings.append((place, text))

    @property
    def faults(self) -> list[str]:
        return [f"{place}: {text}" for place, text in sorted(self._faults)]

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f"{place}: {text}" for place, text in sorted(self._warnings))

    def place(self, section: str, *keys: str) -> Place:
        """Where the first of these keys stands that is there at all, else the section."""
        items = self.sections[section].items
        places = [items[key].place for key in keys if key in items]
        return places[0] if places else self.sections[section].place

    def _read(self, start: Place) -> None:
        try:
            data = Path(start.file).read_bytes()
            mode = os.stat(start.file).st_mode & 0o777
            text = data.decode("utf-8-sig")
        except OSError as error:
            self.fault(start, f"cannot be read: {error.strerror}")
            return
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self.fault(start._replace(line=line), "is not UTF-8")
            return
        sections = self._parse(text, start)
        if mode & 0o037:
            self._warn_of_open_secrets(sections, mode)
        for section in sections:
            first = self.sections.setdefault(section.name, section)
            if first is not section:
                self.fault(section.place, f"[{section.name}] stands in {first.place} already")
                first.items.update(section.items | first.items)

    def _parse(self, text: str, start: Place) -> list[Section]:
        sections: list[Section] = []
        section = item = None
        indent = 0
        for number, line in enumerate(text.split("\n"), 1):
            place = start._replace(line=number)
            stripped = line.strip()
            depth = len(line) - len(line.lstrip())
            if not stripped or stripped[0] in "#;":
                continue
            if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", stripped):
                self.fault(place, "has a control character")
            elif item and depth > indent:
                item.text = f"{item.text}\n{stripped}".strip()
            elif stripped[0] == "[":
                section, item = Section("", place), None
                if header := re.match(r"\[([^\]]+)\]\s*([#;].*)?$", stripped):
                    section.name = " ".join(header[1].split())
                    sections.append(section)
                else:
                    self.fault(place, f"{shown(stripped)} is not a [section]")
            elif not (pair := re.match(r"([^=:]*[^=:\s])\s*[=:]\s*(.*)", stripped)):
                self.fault(place, f"{shown(stripped)} is neither [section] nor key = value")
            else:
                if section is None:
                    section = Section("", place)
                    self.fault(place, "stands before the first [section]")
                key, item, indent = pair[1].lower(), Item(pair[2], place), depth
                first = section.items.setdefault(key, item)
                if first is not item:
                    self.fault(place, f"{key} stands in {first.place} already")
        return sections

    def _warn_of_open_secrets(self, sections: Iterable[Section], mode: int) -> None:
        """A file with a password in it is for its owner and group only."""
        for key, item in (pair for section in sections for pair in section.items.items()):
            named = item.text and "passw" in key and not key.endswith("_file")
            in_url = re.search(r"://[^/@\s]*:[^@\s]+@", item.text)
            target = key.startswith("notify_") and re.search(r"://[^/\s]+/[^\s]", item.text)
            if (named or in_url or target) and "${" not in item.text:
                text = f"{key}: a password others can read (chmod 640, not {mode:o})"
                self.warn(item.place, text)
                return

    def _override(self, env: Mapping[str, str]) -> None:
        """UPQ_DB__URL and UPQ_JOB_HASH__CONCURRENT win over what the files say."""
        by_variable = {name.replace(" ", "_"): section for name, section in self.sections.items()}
        for name in filter(re.compile("UPQ_.+__.").match, sorted(env)):
            place = Place(len(self.files), 0, f"environment variable {name}")
            head, _, key = name.removeprefix("UPQ_").lower().partition("__")
            if head in by_variable:
                by_variable[head].items[key] = Item(env[name], place)
            else:
                self.fault(place, f"no section {shown(head)}{suggest(head, by_variable)}")

    def _expand(self, section: Section, env: Mapping[str, str]) -> None:
        """Put the environment's ${NAME} in; $${NAME} stands for the text ${NAME}."""
        for key, item in list(section.items.items()):
            if not item.place.line:
                continue
            wanted = [name for escaped, name in _VARIABLE.findall(item.text) if not escaped]
            if absent := [name for name in wanted if name not in env]:
                self.fault(item.place, f"{key}: no environment variable {', '.join(absent)}")
                del section.items[key]
            item.text = _VARIABLE.sub(
                lambda found: found[0][1:] if found[1] else env.get(found[2], ""), item.text
            )
