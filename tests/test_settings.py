"""The declarations of settings: each is one, has a meaning, and is of this version."""

from __future__ import annotations

import dataclasses

from upq.declaration import declared
from upq.settings import LATER, OTHER_SECTIONS, SECTIONS, Settings


def test_every_field_is_declared_or_made_by_load() -> None:
    made = {"others", "name", "file", "line", "variables", "missing"}
    made |= {"place", "request", "times", "keys"}
    for section in (*SECTIONS.values(), *OTHER_SECTIONS.values()):
        names = {field.name for field in dataclasses.fields(section)}
        assert names - {each.name for each in declared(section).values()} <= made
    assert list(SECTIONS) == [
        field.name for field in dataclasses.fields(Settings) if field.name in SECTIONS
    ]


def test_every_setting_has_a_meaning_and_is_not_reserved() -> None:
    sections = {**SECTIONS, **OTHER_SECTIONS}
    for name, section in ((name.partition(" ")[0], one) for name, one in sections.items()):
        keys = declared(section)
        assert not set(keys) & set(LATER.get(name, ()))
        assert all(each.meaning.endswith(".") for each in keys.values())
