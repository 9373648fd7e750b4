"""Metrics for Prometheus, at ``GET /metrics``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from litestar import MediaType, Response, get
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..app import PRODUCER_TIMEOUT, Buffer, Change, ChunkBuffer, Page, Parts, Place

LATENCY_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
UNSETTLED = 4096  # commits that are counted later, at most
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)


def mount(parts: Parts) -> None:
    counted = parts.buffer.tell = Metrics(parts.buffer)

    @get("/metrics", summary="For Prometheus", media_type=MediaType.TEXT, scope="admin")
    async def metrics(buffer: Buffer) -> Response[bytes]:
        return Response(await counted.scrape(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    parts.root.append(metrics)


class Metrics:
    """Counts the events of a buffer. Each event has the name of a method."""

    def __init__(self, buffer: ChunkBuffer) -> None:
        self._buffer = buffer
        # Each count takes a lock, so these are counted at the next scrape.
        self._entries = self._bytes = 0
        self._commits: list[tuple[int, int, float]] = []
        self.registry = registry = CollectorRegistry()
        self.chunks_in = Counter("resume_stream_chunks_in", "Chunks committed", registry=registry)
        self.bytes_in = Counter("resume_stream_bytes_in", "Text committed, in bytes of UTF-8", registry=registry)
        self.entries_out = Counter("resume_stream_chunks_out", "Chunks and ends sent to readers", registry=registry)
        self.bytes_out = Counter("resume_stream_bytes_out", "Bytes sent to readers", registry=registry)
        self.commit_chunks = Histogram(
            "resume_stream_commit_chunks", "Chunks in a commit", registry=registry, buckets=SIZE_BUCKETS
        )
        self.commit_seconds = Histogram(
            "resume_stream_commit_seconds", "Time of a commit", registry=registry, buckets=LATENCY_BUCKETS
        )
        self.delivery_seconds = Histogram(
            "resume_stream_append_to_reader_seconds",
            "From an append's arrival to its first reader",
            registry=registry,
            buckets=LATENCY_BUCKETS,
        )
        self.readers = Gauge("resume_stream_readers", "Readers connected", registry=registry)
        self.active_messages = Gauge("resume_stream_active_messages", "Messages not ended", registry=registry)
        self.resumes = Counter("resume_stream_resumes", "Streams begun", ["kind", "outcome"], registry=registry)
        self.aborts = Counter("resume_stream_aborts", "Messages aborted", ["reason"], registry=registry)
        self.relays = Counter(
            "resume_stream_relays", "Answers of upstreams that ended", ["upstream", "outcome"], registry=registry
        )
        self.expiries = Counter("resume_stream_expired_threads", "Threads that outlived the ttl", registry=registry)
        self.database_bytes = Gauge("resume_stream_database_bytes", "Size of the database file", registry=registry)
        self.wal_bytes = Gauge("resume_stream_wal_bytes", "Size of the WAL", registry=registry)

    def __call__(self, event: str, *what: Any) -> None:
        getattr(self, event)(*what)

    def resumed(self, kind: str, place: Place) -> None:
        outcome = "reset" if place.reset else "finished" if place.finished else "resumed"
        self.resumes.labels(kind, outcome).inc()

    def committed(self, changes: Sequence[Change], seconds: float) -> None:
        chunks = sum(len(change.chunks) for change in changes)
        self._commits.append((chunks, sum(change.size for change in changes), seconds))
        if len(self._commits) >= UNSETTLED:
            self._settle()
        for change in changes:
            if change.ended and change.state.status == "aborted":
                # A producer's reason is free text, so it is no label.
                is_timeout = change.state.reason == PRODUCER_TIMEOUT
                self.aborts.labels(PRODUCER_TIMEOUT if is_timeout else "requested").inc()

    def sent(self, page: Page, size: int) -> None:
        self._entries += len(page.entries)
        self._bytes += size
        if getattr(page, "asked", None) is not None:
            self._first_read(page)

    def _first_read(self, page: Any) -> None:
        """Measure how long the appends of a live page took to reach a reader (see extras/live.py)."""
        for part in page.parts or (page,):
            if part.asked is not None:
                self.delivery_seconds.observe(time.perf_counter() - part.asked)
            part.asked = None
        page.asked = None

    def _settle(self) -> None:
        self.entries_out.inc(self._entries)
        self.bytes_out.inc(self._bytes)
        self._entries = self._bytes = 0
        for chunks, size, seconds in self._commits:
            self.chunks_in.inc(chunks)
            self.bytes_in.inc(size)
            self.commit_chunks.observe(chunks)
            self.commit_seconds.observe(seconds)
        self._commits.clear()

    def relayed(self, upstream: str, outcome: str) -> None:
        self.relays.labels(upstream, outcome).inc()

    def expired(self, threads: int) -> None:
        self.expiries.inc(threads)

    async def scrape(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        database_bytes, wal_bytes, active_messages = await self._buffer.store.measure()
        self._settle()
        self.readers.set(self._buffer.readers)
        self.active_messages.set(active_messages)
        self.database_bytes.set(database_bytes)
        self.wal_bytes.set(wal_bytes)
        return generate_latest(self.registry)
