from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations

from tests.stores import Store
from upq import migrations, schema
from upq.db import Database
from upq.errors import DatabaseUnusable
from upq.migrations import has_column, has_index, has_table

SCHEMAS = Path(__file__).parent / "schemas"


class Cut(Exception):
    """The daemon is killed here."""


def add_colour(op: Operations) -> None:
    if not has_column(op, "upq_job", "colour"):
        op.add_column("upq_job", sa.Column("colour", sa.String(20), server_default="grey"))
    if not has_index(op, "upq_job", "upq_job_colour"):
        op.create_index("upq_job_colour", "upq_job", ["colour"])


def add_shelf(op: Operations) -> None:
    if not has_table(op, "upq_shelf"):
        op.create_table("upq_shelf", sa.Column("id", sa.BigInteger, primary_key=True))
        op.execute("UPDATE upq_job SET colour = 'blue'")


def plan(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[Operations], None]) -> None:
    """From now on upq knows these further versions."""
    monkeypatch.setattr(migrations, "STEPS", dict(enumerate(steps, schema.VERSION + 1)))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + len(steps))


def version(url: str) -> int:
    return int(ask(url, "SELECT version FROM upq_version"))


def ask(url: str, question: str) -> Any:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return connection.exec_driver_sql(question).scalar_one()


def shape(url: str) -> dict[str, Any]:
    """The tables as the database has them: columns and indexes."""
    inspector = sa.inspect(sa.create_engine(url, poolclass=sa.NullPool))
    return {
        table: (
            sorted(column["name"] for column in inspector.get_columns(table)),
            sorted(index["name"] or "" for index in inspector.get_indexes(table)),
            {str(index["name"]): parts_of(index) for index in inspector.get_indexes(table)},
        )
        for table in inspector.get_table_names()
    }


def parts_of(index: Any) -> tuple[Any, ...]:
    """Columns, uniqueness and condition of an index."""
    conditions = [str(v) for k, v in index.get("dialect_options", {}).items() if "where" in k]
    return tuple(index["column_names"]), bool(index["unique"]), conditions


def started(url: str) -> None:
    """Start on the database, and stop."""
    database = Database(url)
    try:
        database.prepare()
    finally:
        database.close()


def made_by_version(url: str, found: int) -> None:
    """Fill an empty database with what an earlier upq has left."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    text = (SCHEMAS / f"{found}.{engine.dialect.name}.sql").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("--")]
    with engine.begin() as connection:
        if not getattr(connection.dialect, "is_mariadb", True):
            lines = [
                line.replace(schema.MARIADB_COLLATION, schema.MYSQL_COLLATION) for line in lines
            ]
        for statement in "\n".join(lines).split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement.replace("%", "%%"))


def test_every_version_has_its_step() -> None:
    assert set(migrations.STEPS) == set(range(2, schema.VERSION + 1))


@pytest.mark.parametrize("found", sorted({int(p.name.split(".")[0]) for p in SCHEMAS.glob("*")}))
def test_tables_of_every_earlier_version_become_ours(url: str, found: int) -> None:
    made_by_version(url, found)
    with Store(url) as store:
        assert [job.params["n"] for job in store.claim(5)] == [0, 1, 2]
        assert store.submit() > 3
    stepped = shape(url)
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        schema.meta.drop_all(connection)
    started(url)
    assert stepped == shape(url)


def test_an_older_schema_is_stepped_up_with_its_rows(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(url) as store:
        id = store.submit(params={"fid": 1})
    plan(monkeypatch, add_colour, add_shelf)
    with Store(url) as store:
        assert store.views.job(id)["params"] == {"fid": 1}
        assert store.submit() == id + 1
    assert version(url) == schema.VERSION
    assert ask(url, f"SELECT colour FROM upq_job WHERE id = {id}") == "blue"
    assert "upq_job_colour" in shape(url)["upq_job"][1]
    assert "upq_shelf" in shape(url)


@pytest.mark.parametrize("cut_at", ["column", "index", "step"])
def test_a_step_that_was_cut_off_is_done_again(
    url: str, monkeypatch: pytest.MonkeyPatch, cut_at: str
) -> None:
    started(url)
    old = schema.VERSION
    killed = [True]

    def dying(op: Operations) -> None:
        """`add_colour`, and the first time the end in the middle of it."""
        if cut_at == "step" or not killed:
            add_colour(op)
        elif cut_at == "column":
            op.add_column("upq_job", sa.Column("colour", sa.String(20), server_default="grey"))
        else:
            op.add_column("upq_job", sa.Column("colour", sa.String(20), server_default="grey"))
            op.create_index("upq_job_colour", "upq_job", ["colour"])
        if killed:
            killed.clear()
            raise Cut

    plan(monkeypatch, dying, add_shelf)
    with pytest.raises(Cut):
        started(url)
    assert version(url) == old
    if not url.startswith("mysql"):
        assert "colour" not in shape(url)["upq_job"][0]
    started(url)
    assert version(url) == old + 2
    assert "colour" in shape(url)["upq_job"][0]
    assert "upq_job_colour" in shape(url)["upq_job"][1]


def test_the_steps_before_a_cut_are_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started(url)

    def dying(op: Operations) -> None:
        raise Cut

    plan(monkeypatch, add_colour, dying)
    with pytest.raises(Cut):
        started(url)
    assert version(url) == schema.VERSION - 1
    assert "colour" in shape(url)["upq_job"][0]


def test_a_newer_schema_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(schema, "VERSION", schema.VERSION + 1)
        started(url)
    before = shape(url)
    with pytest.raises(DatabaseUnusable, match=f"version {schema.VERSION + 1}, .*newer upq"):
        started(url)
    assert shape(url) == before


def test_a_version_that_no_step_leads_to_is_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(url)
    plan(monkeypatch, add_colour, add_shelf)
    del migrations.STEPS[schema.VERSION]
    with pytest.raises(DatabaseUnusable, match="no way"):
        started(url)
    assert version(url) == schema.VERSION - 2


def test_a_first_start_that_was_cut_off_is_done_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [0]

    def count(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.lstrip().startswith(("CREATE", "INSERT")):
            left[0] -= 1
            if left[0] == 0:
                raise Cut

    sa.event.listen(sa.Engine, "before_cursor_execute", count)
    try:
        for left[0] in (2, 5, 7):
            with pytest.raises(Cut):
                started(url)
        left[0] = 0
        started(url)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", count)
    assert version(url) == schema.VERSION
    assert {name: parts[:2] for name, parts in shape(url).items()} == {
        table.name: (sorted(c.name for c in table.c), sorted(str(i.name) for i in table.indexes))
        for table in schema.meta.sorted_tables
    } | {"upq_lane": shape(url)["upq_lane"][:2]}
