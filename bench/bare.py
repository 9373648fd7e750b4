"""The limit: sqlite3 does the same work in this process, on the same schema, without a service."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import msgspec

from .load import TOKEN
from .servers import ROOT

encode = msgspec.json.encode


class BareTable:
    """A database with the service's schema, and one message of one thread."""

    def __init__(self, path: Path, synchronous: str = "FULL") -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("pragma journal_mode = wal")
        self._connection.execute(f"pragma synchronous = {synchronous}")
        self._connection.executescript((ROOT / "schema.sql").read_text())
        self._connection.execute(
            "insert into threads (thread, thread_id, generation, created_at, updated_at) values (1, 'bare', 1, 0, 0)"
        )
        self._connection.execute(
            "insert into messages (message, thread, message_id, first_seq, created_at, updated_at)"
            " values (1, 1, 'run', 1, 0, 0)"
        )
        self._last_seq = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def commit(self, texts: Sequence[str]) -> None:
        """Append in one transaction, with the writes of a real append."""
        now = time.time_ns() // 1_000_000
        first_seq = self._last_seq + 1
        self._last_seq += len(texts)
        self._connection.execute("begin immediate")
        self._connection.executemany(
            "insert into chunks (thread, seq, message, event, content, timestamp) values (1, ?, 1, null, ?, ?)",
            [(seq, text, now) for seq, text in enumerate(texts, first_seq)],
        )
        self._connection.execute(
            "update threads set last_seq = ?, updated_at = ? where thread = 1", (self._last_seq, now)
        )
        self._connection.execute(
            "update messages set chunk_count = ?, size = size + ?, last_seq = ?, updated_at = ? where message = 1",
            (self._last_seq, sum(map(len, texts)), self._last_seq, now),
        )
        self._connection.execute("commit")

    def rows_per_second(self, group: int, seconds: float) -> float:
        """Return the rows committed a second, in transactions of ``group`` rows."""
        texts = [TOKEN] * group
        began, rows = time.monotonic(), 0
        while (took := time.monotonic() - began) < seconds:
            self.commit(texts)
            rows += group
        return rows / took


def frames_of(path: Path, count: int) -> float:
    """Read the first thread's chunks, make SSE frames of them, and return the seconds that takes."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.execute("select count(*) from sqlite_schema").fetchone()
        began = time.monotonic()
        rows = connection.execute(
            "select seq, message_id, content, timestamp from chunks join messages using (message)"
            " where chunks.thread = 1 order by seq limit ?",
            (count,),
        )
        frames = b"".join(
            b'id: 1-%d\ndata: {"content":%s,"timestamp":%d,"messageId":%s,"seq":%d}\n\n'
            % (seq, encode(content), timestamp, encode(message_id), seq)
            for seq, message_id, content, timestamp in rows
        )
        took = time.monotonic() - began
    if frames.count(b"\n\n") != count:
        raise AssertionError("the bare loop did not make every frame")
    return took
