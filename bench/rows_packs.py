"""Rows of packed messages: their size, their readers, and appends during packing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .load import MARK, TIMEOUT, Client, append_request, call, create, request_bytes, seconds_to_last, stream_request
from .plan import Plan, Stage
from .results import Aim, BenchError, Line, Missing, Row, Samples, at_most_times, interleave, under
from .rows_resume import median_ms
from .servers import Server, service

OFF = ("--packing", "false")
AT_ONCE = ("--cleanup-interval", "1s")
APPEND = 10  # chunks in an append, which share a timestamp
MESSAGE_BYTES = 64 * 1024**2
CHUNK_BYTES = 1_000  # in the large message
PAUSE = 0.002  # seconds between two appends during packing


def tokens(count: int) -> list[str]:
    """Return texts of 5 bytes, drawn from 2,000 like words: the second is half as frequent as the first, and so on."""
    source = random.Random(count)
    words = [f" {''.join(source.choices('etaoinshrdlu', k=3))}{MARK.decode()}" for _ in range(2_000)]
    return source.choices(words, [1 / place for place in range(1, len(words) + 1)], k=count)


def store(server: Server, thread: str, texts: Sequence[str], at_a_time: int = APPEND) -> None:
    """Append the texts to a new message, and complete it."""
    with Client(server.port) as client:
        for start in range(0, len(texts), at_a_time):
            chunks = [{"content": text} for text in texts[start : start + at_a_time]]
            client.exchange(append_request(server, thread, json.dumps(chunks).encode()))
    complete(server, thread)


def complete(server: Server, thread: str) -> None:
    call(server.port, "POST", f"/api/threads/{thread}/messages/run/complete")


def is_packed(database: Path, thread: str) -> bool:
    """Return True if all but a few chunks at the thread's end are packed."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        (left,) = connection.execute(
            "select count(*) from (select 1 from chunks join threads using (thread) where thread_id = ? limit 64)",
            (thread,),
        ).fetchone()
    return bool(left < 64)


def wait_until_packed(folder: Path, thread: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not is_packed(folder / "chunks.db", thread):
        if time.monotonic() > deadline:
            raise BenchError(f"{thread} is not packed after {TIMEOUT:.0f} s")
        time.sleep(0.05)


def bytes_for_each(plan: Plan, name: str, texts: Sequence[str], is_packing: bool) -> Samples:
    """Return the bytes of the database file for each text, after the service has stopped."""
    folder = plan.place(f"{name}-{is_packing}")
    with service(folder, (*(AT_ONCE if is_packing else OFF), "--synchronous", "NORMAL")) as server:
        store(server, "ended", texts)
        if is_packing:
            wait_until_packed(folder, "ended")
    size = (folder / "chunks.db").stat().st_size
    (folder / "chunks.db").unlink()
    return Samples((size / len(texts),))


def recordings(count: int) -> dict[str, list[str]]:
    """Return so many lines or more of each file in the folder RECORDINGS, repeated, by the file's name."""
    found = {}
    for path in sorted(Path(os.environ.get("RECORDINGS", os.devnull)).glob("*.jsonl")):
        lines = path.read_text().splitlines()
        found[path.name] = lines * -(-count // len(lines))
    return found


def sizes(plan: Plan) -> list[Line]:
    count = plan.scaled(100_000, 10_000)
    lines = []
    for name, texts in {"5 bytes": tokens(count), **recordings(count // 5)}.items():
        ours, unpacked = (bytes_for_each(plan, name, texts, is_packing) for is_packing in (True, False))
        aim = under(5, "bytes", ours) if name == "5 bytes" else at_most_times(1 / 5, ours, unpacked, UNPACKED)
        lines.append(Line(f"disk for each chunk of {name}", "bytes", ours, {UNPACKED: unpacked}, [aim]))
    return lines


UNPACKED = "unpacked"


def catch_up(plan: Plan) -> Line:
    count, goes = plan.scaled(10_000, 2_000), 5
    title = f"catch-up of {count:,} chunks over SSE"
    with Stage(plan, "packed-catch-up") as stage:
        servers = {title: AT_ONCE, UNPACKED: OFF}
        for name, flags in servers.items():
            stage.start(name, partial(service, flags=flags))
            store(stage.servers[name], "history", tokens(count))
        wait_until_packed(stage.folder / "server-0", "history")
        figures = stage.sample(
            {
                name: partial(
                    median_ms, goes, partial(seconds_to_last, server.port, stream_request(server, "history"), count)
                )
                for name, server in stage.servers.items()
            }
        )
    ours, unpacked = figures[title], figures[UNPACKED]
    return Line(title, "ms", ours, {UNPACKED: unpacked}, [at_most_times(1, ours, unpacked, UNPACKED)])


def longest_wait(client: Client, request: bytes, until: float) -> float:
    """Append until the clock shows ``until``, and return the milliseconds of the slowest append."""
    longest = 0.0
    while (began := time.monotonic()) < until:
        client.exchange(request)
        longest = max(longest, time.monotonic() - began)
        time.sleep(PAUSE)
    return longest * 1000


def waits(plan: Plan, number: int) -> tuple[float, float]:
    """Return the longest append while a large message is packed, and for as long without packing."""
    folder = plan.place(f"waits-{number}")
    text = "".join(tokens(MESSAGE_BYTES // 5))
    texts = [text[start : start + CHUNK_BYTES] for start in range(0, len(text), CHUNK_BYTES)]
    with service(folder, (*AT_ONCE, "--max-message", "80MiB")) as server, Client(server.port) as client:
        create(server, "large")
        request = request_bytes("POST", server.api.append.replace("@", "small"), b'{"content":"word"}')
        store(server, "large", texts, 1_000)
        began, longest = time.monotonic(), 0.0
        while not is_packed(folder / "chunks.db", "large"):
            longest = max(longest, longest_wait(client, request, time.monotonic() + 0.1))
            if time.monotonic() > began + TIMEOUT:
                raise BenchError(f"the large message is not packed after {TIMEOUT:.0f} s")
        took = time.monotonic() - began
        time.sleep(2)
        return longest, longest_wait(client, request, time.monotonic() + took)


def wait_of_appends(plan: Plan) -> Line:
    taken = interleave(1 if plan.quick else min(plan.rounds, 3), {"waits": partial(waits, plan)})["waits"]
    ours, without = (Samples(tuple(pair[place] for pair in taken)) for place in (0, 1))
    more = ours.median - without.median
    aim = Aim("under 20 ms more than without", f"{more:.1f} ms more", more < 20)
    return Line("the longest append while 64 MiB are packed", "ms", ours, {"without": without}, [aim])


def packs(plan: Plan) -> Row:
    """Measure packed messages."""
    lines = [*sizes(plan), catch_up(plan), wait_of_appends(plan)]
    if not recordings(1):
        lines.append(Line("disk for each chunk of recorded streams", "bytes", Missing("RECORDINGS names no folder")))
    tokens_line = lines[0]
    return Row(
        "Packed at rest",
        f"Disk is the database file of one completed message after the service has stopped, with and without packing;"
        f" the message was stored {APPEND} chunks an append. Tokens are drawn from 2,000 of 5 bytes with the"
        " frequencies of words. Recorded streams are the files in the folder RECORDINGS, one line a chunk, repeated up"
        " to 20,000 chunks (the repetitions are further apart than the compressor sees). Catch-up is as above. The"
        " longest append is that of a producer that appends a chunk every few ms to its own thread, synchronous=FULL,"
        " while a message of 64 MiB in chunks of 1,000 bytes is packed, beside as long a time without packing.",
        lines,
        f"**At rest:** {tokens_line.ours} bytes on disk for each chunk of 5 bytes in a packed message,"
        f" {tokens_line.beside[UNPACKED]} before packing.",
    )
