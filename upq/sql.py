"""Statements for all three databases: built with SQLAlchemy Core, run as strings on the driver.

A statement over `rows()` does a whole batch at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import ClauseElement

from upq import log


def rows(dialect: str, **columns: type) -> sa.Subquery:
    """A table made from one JSON parameter `:rows`, a list of lists in the order of `columns`.

    One statement then serves a whole batch on every database: one round trip to a server, and one
    release of Python's lock by the driver instead of one a row, which other threads would take.
    """
    named = list(columns.items())
    if dialect == "sqlite":
        picked = ", ".join(f"value->>{i} AS {name}" for i, (name, _) in enumerate(named))
        source = f"SELECT {picked} FROM json_each(:rows)"
    elif dialect == "postgresql":
        word = {int: "BIGINT", str: "TEXT"}
        picked = ", ".join(f"CAST(v->>{i} AS {word[t]}) AS {n}" for i, (n, t) in enumerate(named))
        source = f"SELECT {picked} FROM jsonb_array_elements(CAST(:rows AS jsonb)) AS v"
    else:
        word = {int: "BIGINT", str: "LONGTEXT"}
        made = ", ".join(f"{n} {word[t]} PATH '$[{i}]'" for i, (n, t) in enumerate(named))
        source = f"SELECT * FROM JSON_TABLE(:rows, '$[*]' COLUMNS({made})) AS j"
    kinds: dict[type, sa.types.TypeEngine[Any]] = {int: sa.BigInteger(), str: sa.Text()}
    # With a value, or an IN beside it could not be spelt out when the statement is compiled.
    source_of = sa.text(source).bindparams(sa.bindparam("rows", None, type_=sa.Text()))
    return source_of.columns(**{n: kinds[t] for n, t in named}).subquery("r")


class Sql:
    """A Core statement, compiled once per dialect and run as a string on the driver's cursor.

    `build(dialect name)` makes it; what is the same everywhere is given as the statement itself.
    """

    def __init__(self, build: ClauseElement | Callable[[str], ClauseElement]) -> None:
        self._build = build
        self._compiled: dict[str, tuple[str, Sequence[str] | None, Mapping[str, Any]]] = {}

    def on(self, dialect: sa.Dialect) -> tuple[str, Sequence[str] | None, Mapping[str, Any]]:
        name = "mysql" if dialect.name == "mariadb" else dialect.name
        found = self._compiled.get(name)
        if found is None:
            statement = self._build(name) if callable(self._build) else self._build
            compiled = statement.compile(
                dialect=dialect, compile_kwargs={"render_postcompile": True}
            )
            names = list(compiled.positiontup) if compiled.positional else None  # type: ignore[attr-defined]
            found = self._compiled[name] = (str(compiled), names, dict(compiled.params))
        return found

    def filled(
        self, dialect: sa.Dialect, values: Sequence[Sequence[Any]], params: Mapping[str, Any]
    ) -> tuple[str, Any]:
        """The text of a statement over `rows()`, with what it is to be given on this driver."""
        text, names, defaults = self.on(dialect)
        merged = {**defaults, "rows": _encode(values), **params}
        return text, merged if names is None else tuple(merged[name] for name in names)


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Tx:
    """One transaction of the writer, on the driver's own cursor."""

    def __init__(self, dialect: sa.Dialect, cursor: Any, alone: bool) -> None:
        self.dialect = dialect
        self.cursor = cursor
        #: True when the transaction holds a single change, after a batch did not go through.
        self.alone = alone

    def run(self, sql: Sql, **params: Any) -> int:
        """Execute; returns the number of rows that matched."""
        text, names, defaults = sql.on(self.dialect)
        log.statement(text)
        if names is None:
            self.cursor.execute(text, {**defaults, **params})
        else:
            merged = {**defaults, **params} if defaults else params
            self.cursor.execute(text, tuple(merged[name] for name in names))
        return int(self.cursor.rowcount)

    def run_rows(self, sql: Sql, values: Sequence[Sequence[Any]], **params: Any) -> int:
        """Execute a statement over `rows()`."""
        return self.run(sql, rows=_encode(values), **params)

    def fetch(self, sql: Sql, **params: Any) -> list[Any]:
        self.run(sql, **params)
        return list(self.cursor.fetchall())

    def fetch_rows(self, sql: Sql, values: Sequence[Sequence[Any]], **params: Any) -> list[Any]:
        self.run_rows(sql, values, **params)
        return list(self.cursor.fetchall())
