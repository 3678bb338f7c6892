"""What a chat model was asked and answered, and what that cost: an SQLite file that rows are only added to.

A request is entered with all that it may cost before it is sent, and settled when its answer is there. So the sums
never fall below what was spent, the cap holds across runs, and a killed build finds every answer it has paid for.
Standard library only.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FINISHED = "finished"
IN_FLIGHT = "in_flight"

_TABLES = """
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL, outcome TEXT NOT NULL, answer TEXT,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cost_usd REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS answers ON requests (key) WHERE outcome = 'finished';
CREATE TABLE IF NOT EXISTS spent (tokens INTEGER NOT NULL, cost_usd REAL NOT NULL);
INSERT INTO spent SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM spent);
"""


@dataclass(frozen=True)
class Usage:
    """Tokens and US dollars of a request."""

    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0

    @property
    def tokens(self) -> int:
        """Input and output."""
        return self.input_tokens + self.output_tokens


class AnswerStore:
    """
    Requests, their answers, and what all of them have cost so far.

    Args:
        path (`Path`): The file; made when missing.
        max_tokens (`int`, *optional*), max_cost_usd (`float`, *optional*): Caps on the sums; missing = none.
    """

    def __init__(self, path: Path, max_tokens: int | None = None, max_cost_usd: float | None = None) -> None:
        self.max_tokens, self.max_cost_usd = max_tokens, max_cost_usd
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        # Write-ahead logging survives a killed process without a disk flush per row.
        self._connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.executescript(_TABLES)

    def answer(self, key: str) -> str | None:
        """The newest finished answer to a request, or `None`."""
        with self._lock:
            query = "SELECT answer FROM requests WHERE key = ? AND outcome = ? ORDER BY number DESC LIMIT 1"
            row = self._connection.execute(query, (key, FINISHED)).fetchone()
        return row[0] if row else None

    def reserve(self, key: str, most: Usage) -> int | None:
        """Enters a request with the most that it may cost; its number, or `None` where a cap has no room for it."""
        with self._transaction() as connection:
            tokens, cost = connection.execute("SELECT tokens, cost_usd FROM spent").fetchone()
            if self.max_tokens is not None and tokens + most.tokens > self.max_tokens:
                return None
            if self.max_cost_usd is not None and cost + most.cost_usd > self.max_cost_usd:
                return None
            connection.execute("UPDATE spent SET tokens = tokens + ?, cost_usd = cost_usd + ?", _sums(most))
            values = (key, IN_FLIGHT, most.input_tokens, most.output_tokens, most.cost_usd)
            insert = (
                "INSERT INTO requests (key, outcome, input_tokens, output_tokens, cost_usd) VALUES (?, ?, ?, ?, ?)"
            )
            return connection.execute(insert, values).lastrowid

    def settle(self, number: int, outcome: str, usage: Usage, answer: str | None = None) -> None:
        """Enters how a request ended, what it really cost, and its answer where it is finished."""
        with self._transaction() as connection:
            columns = "input_tokens, output_tokens, cost_usd"
            row = connection.execute(f"SELECT {columns} FROM requests WHERE number = ?", (number,)).fetchone()
            most = Usage(*row)
            connection.execute(
                "UPDATE requests SET outcome = ?, answer = ?, input_tokens = ?, output_tokens = ?, cost_usd = ? "
                "WHERE number = ?",
                (outcome, answer, usage.input_tokens, usage.output_tokens, usage.cost_usd, number),
            )
            connection.execute(
                "UPDATE spent SET tokens = tokens + ?, cost_usd = cost_usd + ?",
                (usage.tokens - most.tokens, usage.cost_usd - most.cost_usd),
            )

    def spent(self) -> tuple[int, float]:
        """Tokens and US dollars so far, requests in flight with the most that they may cost."""
        with self._lock:
            return self._connection.execute("SELECT tokens, cost_usd FROM spent").fetchone()

    def outcomes(self) -> dict[str, int]:
        """Number of requests by outcome."""
        with self._lock:
            query = "SELECT outcome, COUNT(*) FROM requests GROUP BY outcome ORDER BY outcome"
            return dict(self._connection.execute(query).fetchall())

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")


def _sums(usage: Usage) -> tuple[int, float]:
    return usage.tokens, usage.cost_usd
