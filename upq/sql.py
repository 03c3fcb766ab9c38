"""Statements for all three databases: built with SQLAlchemy Core, run as strings on the driver.

A statement over `rows()` does a whole batch at once.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
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
        # In quotes: `rank` is a word of MySQL's own.
        made = ", ".join(f"`{n}` {word[t]} PATH '$[{i}]'" for i, (n, t) in enumerate(named))
        source = f"SELECT * FROM JSON_TABLE(:rows, '$[*]' COLUMNS({made})) AS j"
    kinds: dict[type, sa.types.TypeEngine[Any]] = {int: sa.BigInteger(), str: sa.Text()}
    # With a value, or an IN beside it could not be spelt out when the statement is compiled.
    source_of = sa.text(source).bindparams(sa.bindparam("rows", None, type_=sa.Text()))
    return source_of.columns(**{n: kinds[t] for n, t in named}).subquery("r")


class Sql:
    """A Core statement, compiled once per dialect and run as a string on the driver's cursor.

    `build(dialect name)` makes it; what is the same everywhere is given as the statement itself.
    `each` says of one over `rows()` that each of them stands for itself, so that several statements
    over some of them do the same.
    """

    def __init__(
        self, build: ClauseElement | Callable[[str], ClauseElement], *, each: bool = False
    ) -> None:
        self._build = build
        self.each = each
        self._compiled: dict[str, tuple[str, Sequence[str] | None, Mapping[str, Any]]] = {}
        # By the number of rows.
        self._over: dict[int, str] = {}

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

    def spread(
        self, dialect: sa.Dialect, values: Sequence[Sequence[Any]], params: Mapping[str, Any]
    ) -> list[tuple[str, tuple[Any, ...]]]:
        """The texts for SQLite, each with some of the rows, which are given value by value.

        One but for very many rows: another thread may take Python's lock at each statement, and
        keep it. What is missing to a number that is prepared are rows of NULL, which match nothing.
        """
        _, names, defaults = self.on(dialect)
        assert names is not None
        given = {**defaults, **params}
        at = names.index("rows")
        before = [given[name] for name in names[:at]]
        after = [given[name] for name in names[at + 1 :]]
        found = []
        for done in range(0, len(values), SIZES[-1]):
            part = values[done : done + SIZES[-1]]
            n = SIZES[bisect_left(SIZES, len(part))]
            text = self._over.get(n) or self._make(dialect, n)
            none = (None,) * ((n - len(part)) * len(part[0]))
            found.append((text, (*before, *chain.from_iterable(part), *none, *after)))
        return found

    def _make(self, dialect: sa.Dialect, n: int) -> str:
        columns, width = JSON_COLUMN.subn(
            lambda found: f"column{int(found[1]) + 1}", self.on(dialect)[0]
        )
        row = f"({', '.join('?' * width)})"
        text = columns.replace("json_each(?)", f"(VALUES {', '.join([row] * n)})")
        return self._over.setdefault(n, text)


#: A column of `rows()` in SQLite.
JSON_COLUMN = re.compile(r"value->>(\d+)")
#: SQLite reads rows that are given value by value three times faster than from JSON, but has to
#: prepare a statement for each number of them: these.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

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
        if names is None:
            self._execute(sql, text, {**defaults, **params})
        else:
            merged = {**defaults, **params} if defaults else params
            self._execute(sql, text, tuple(merged[name] for name in names))
        return int(self.cursor.rowcount)

    def run_rows(self, sql: Sql, values: Sequence[Sequence[Any]], **params: Any) -> int:
        """Execute a statement over `rows()`."""
        if not sql.each or self.dialect.name != "sqlite":
            return self.run(sql, rows=_encode(values), **params)
        matched = 0
        for text, given in sql.spread(self.dialect, values, params):
            self._execute(sql, text, given)
            matched += self.cursor.rowcount
        return matched

    def fetch(self, sql: Sql, **params: Any) -> list[Any]:
        self.run(sql, **params)
        return list(self.cursor.fetchall())

    def fetch_rows(self, sql: Sql, values: Sequence[Sequence[Any]], **params: Any) -> list[Any]:
        if not sql.each or self.dialect.name != "sqlite":
            return self.fetch(sql, rows=_encode(values), **params)
        found: list[Any] = []
        for text, given in sql.spread(self.dialect, values, params):
            self._execute(sql, text, given)
            found += self.cursor.fetchall()
        return found

    def _execute(self, sql: Sql, text: str, given: Any) -> None:
        log.statement(text)
        self.cursor.execute(text, given)
