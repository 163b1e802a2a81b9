"""Finished trials in one SQLite file: none is lost, none is run twice."""

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from evenkeel.errors import StoreError

SCHEMA_VERSION = 1


class Store:
    """A table of finished trials by key. One process writes; a trial is one committed transaction.

    The file is locked for writing while it is open, so a second audit on it is refused rather than
    left to run the same trials. The lock ends with the process, however it ends.

    Args:
        path: the file; made if it is not there. ":memory:" keeps nothing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=2)
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS trial (key TEXT PRIMARY KEY, identity TEXT NOT NULL, "
                "result TEXT NOT NULL, finished TEXT NOT NULL DEFAULT (datetime('now')))"
            )
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise StoreError(
                    f"{self.path} was written by a newer evenkeel (schema {version}, this one "
                    f"knows {SCHEMA_VERSION}). Use that version, or another file."
                )
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            why = (
                "another audit is writing to it; wait for it, or give another store"
                if "locked" in str(error)
                else f"{error}; give a path in a folder that can be written, to a file that is a "
                "store or new"
            )
            raise StoreError(f"Cannot open the store {self.path}: {why}.") from error

    def results(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The results of those of the trials that are finished."""
        wanted = list(keys)
        found: dict[str, dict[str, Any]] = {}
        for at in range(0, len(wanted), 500):
            part = wanted[at : at + 500]
            marks = ",".join("?" * len(part))
            rows = self._db.execute(f"SELECT key, result FROM trial WHERE key IN ({marks})", part)
            found |= {key: json.loads(result) for key, result in rows}
        return found

    def add(self, key: str, identity: str, result: dict[str, Any]) -> None:
        """Keep a finished trial, for good."""
        try:
            self._db.execute(
                "INSERT INTO trial (key, identity, result) VALUES (?, ?, ?)",
                (key, identity, json.dumps(result)),
            )
        except sqlite3.Error as error:
            raise StoreError(f"Cannot write to the store {self.path}: {error}.") from error

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM trial").fetchone()[0])

    def close(self) -> None:
        """Give the file free."""
        self._db.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
