"""Statements that do a whole batch at once."""

from __future__ import annotations

from upq.sql import rows


def test_a_column_may_be_called_what_is_a_word_of_the_database() -> None:
    """MySQL, unlike MariaDB, has a function RANK() and took no submit for it."""
    assert "COLUMNS(`rank` BIGINT PATH '$[0]')" in str(rows("mysql", rank=int))
