"""A PostgreSQL database and a user for each application."""

from __future__ import annotations

import contextlib
import secrets
from typing import Any

import psycopg
from psycopg import sql

from deploylib.settings import Settings, TaskError, valid_app
from deploylib.steps import write_whole


def create_database(settings: Settings, app: str) -> dict[str, Any]:
    """Name, host, port, user and password of the application's database, made if needed.

    The password is drawn at random, once, and kept in a file that only the tasks can read.
    """
    name = f"dz_{valid_app(app)}"
    password = _password(settings, app)
    try:
        with psycopg.connect(settings.database_admin, autocommit=True) as connection:
            # A statement of a task that was killed may still go on in the server.
            connection.execute("SELECT pg_advisory_lock(hashtext(%s))", [name])
            _give_user(connection, name, password)
            created = _make(connection, name)
    except psycopg.Error as error:
        raise TaskError(f"database {name}: {error}") from error
    return {
        "name": name, "host": settings.database_host, "port": settings.database_port, "user": name,
        "password": password, "created": created,
    }  # fmt: skip


def _password(settings: Settings, app: str) -> str:
    folder = settings.folder("passwords")
    folder.chmod(0o700)
    file = folder / app
    if not file.exists():
        write_whole(file, secrets.token_urlsafe(24), 0o600)
    return file.read_text()


def _give_user(connection: psycopg.Connection[Any], name: str, password: str) -> None:
    """The server is sent what it is to keep of the password, and not the password itself."""
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        connection.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    kept = connection.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256")
    statement = sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}")
    connection.execute(statement.format(sql.Identifier(name), sql.Literal(kept.decode())))


def _make(connection: psycopg.Connection[Any], name: str) -> bool:
    try:
        connection.execute(sql.SQL("CREATE DATABASE {0} OWNER {0}").format(sql.Identifier(name)))
    except psycopg.errors.DuplicateDatabase:
        return False
    connection.execute(
        sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name))
    )
    return True
