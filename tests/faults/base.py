"""What the faults share: the verdict, and a client that copes with broken connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Self
from urllib.parse import quote

from conftest import until

TIMEOUT = 30.0  # seconds after which something hangs
BROKEN_LINK = (OSError, EOFError, asyncio.IncompleteReadError, TimeoutError, ValueError)
eventually = partial(until, seconds=TIMEOUT, despite=BROKEN_LINK)


@dataclass
class Verdict:
    """How often a fault was tried and survived, and what broke."""

    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def trial(self, name: str) -> Iterator[None]:
        """Count a trial. It is survived if nothing breaks in the block."""
        self.tried += 1
        before = len(self.broken)
        try:
            yield
        except Exception as error:
            self.fail(f"{name}: {type(error).__name__}: {error}")
        if len(self.broken) == before:
            self.survived += 1

    def fail(self, what: str) -> None:
        self.broken.append(what)

    def expect(self, condition: object, what: str) -> None:
        if not condition:
            self.fail(what)

    def compare(self, where: str, found: str, pieces: Sequence[str], acknowledged: int) -> None:
        """Compare a message's text, as found, with the numbered pieces that its producer made."""
        numbers = [int(number) for number in re.findall(r"(\d+)~", found)]
        lost = len(set(range(acknowledged)) - set(numbers))
        duplicated = len(numbers) - len(set(numbers))
        out_of_order = sum(later < earlier for earlier, later in pairwise(numbers))
        self.lost += lost
        self.duplicated += duplicated
        self.out_of_order += out_of_order
        if lost or duplicated or out_of_order:
            self.fail(f"{where}: {lost} lost, {duplicated} duplicated, {out_of_order} out of order")
        elif not "".join(pieces).startswith(found):
            self.fail(f"{where}: not what its producer sent")

    @property
    def is_sound(self) -> bool:
        return not self.broken

    def __str__(self) -> str:
        counts = f"tried {self.tried:>5}  survived {self.survived:>5}  lost {self.lost}  duplicated {self.duplicated}"
        return f"{self.fault:<44} {counts}  out of order {self.out_of_order}"


def piece(number: int, size: int) -> str:
    """Return a numbered piece, of which producers make their texts."""
    return f"{number}~" + ("wörd 🙂\n" * (size // 7 + 1))[:size]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def is_problem(self) -> bool:
        """True if it is a problem document with a detail."""
        return self.headers.get("content-type") == "application/problem+json" and bool(self.json["detail"])


class Link:
    """One HTTP/1.1 connection that sends and reads every byte by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator[Self]:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
        link = cls(reader, writer)
        try:
            yield link
        finally:
            link.close()

    def close(self) -> None:
        self.writer.transport.abort()

    def send_head(self, method: str, path: str, headers: dict[str, str] | None = None) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())

    async def send_piece(self, data: bytes) -> None:
        """Send a piece of a chunked body. An empty piece ends the body."""
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    async def read_head(self) -> int:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return self.status

    async def pieces(self) -> AsyncIterator[bytes]:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            if size := int(self.headers.get("content-length", "0")):
                yield await self.reader.readexactly(size)
            return
        while size := int(await self.reader.readline() or b"0", 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()

    async def answer(self) -> Answer:
        async with asyncio.timeout(TIMEOUT):
            status = await self.read_head()
            return Answer(status, self.headers, b"".join([piece async for piece in self.pieces()]))

    async def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        self.send_head(method, path, {**(headers or {}), "Content-Length": str(len(body))})
        self.writer.write(body)
        return await self.answer()

    async def events(self) -> AsyncIterator[dict[str, str]]:
        """Yield the server-sent events of a stream, with their ``id``, ``event``, and ``data``."""
        rest = b""
        async for piece in self.pieces():
            *blocks, rest = (rest + piece).split(b"\n\n")
            for block in blocks:
                lines = [line.partition(": ") for line in block.decode().split("\n")]
                yield {name: value for name, _, value in lines if name in ("id", "event", "data")}


async def call(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """Send one request on its own connection. A body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    async with Link.to(port) as link:
        return await link.ask(method, path, data, {**kind, "Connection": "close", **(headers or {})})


def thread_path(thread: str, rest: str = "") -> str:
    return f"/api/threads/{quote(thread, safe='')}{rest}"


def message_path(thread: str, message: str, rest: str = "chunks") -> str:
    return thread_path(thread, f"/messages/{quote(message, safe='')}/{rest}")


async def append(port: int, thread: str, message: str, *texts: str, query: str = "") -> Answer:
    return await call(port, "POST", message_path(thread, message, f"chunks{query}"), [{"content": t} for t in texts])
