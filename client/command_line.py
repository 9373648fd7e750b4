"""``resume-stream publish`` and ``resume-stream tail``: a producer and a reader for the shell.

``add_commands`` names them to an ``argparse`` parser, ``run`` runs one; the exit status is 0 where the
message was completed, 1 where it was not, and 128 and the signal's number where one came.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from . import Item

PIECE = 8192  # bytes that are read at once, at most: far below what a service takes as a chunk
DEFAULT_URL = "http://127.0.0.1:8000"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``publish`` and ``tail`` to what ``ArgumentParser.add_subparsers`` returned."""
    publishing = commands.add_parser("publish", help="store standard input as a message, while it comes")
    publishing.add_argument("thread")
    publishing.add_argument("message")
    tailing = commands.add_parser("tail", help="write a message, or all of a thread's, while it comes")
    tailing.add_argument("thread")
    tailing.add_argument("message", nargs="?")
    tailing.add_argument("--after", help="begin behind this cursor")
    tailing.add_argument("--wait", action="store_true", help="wait for what is not made yet")
    for added in (publishing, tailing):
        added.set_defaults(run=lambda flags: run(flags["command"], flags))
        added.add_argument("--url", help=f"the service (default: RESUME_STREAM_URL, or {DEFAULT_URL})")
        added.add_argument("--token", help="the bearer token (default: RESUME_STREAM_TOKEN, which others cannot see)")


def run(command: str, flags: Mapping[str, Any]) -> int:
    """Run ``publish`` or ``tail`` with the flags as parsed; the exit status."""
    url = flags.get("url") or os.environ.get("RESUME_STREAM_URL") or DEFAULT_URL
    token = flags.get("token") or os.environ.get("RESUME_STREAM_TOKEN") or None
    thread, message = flags["thread"], flags.get("message")
    logging.basicConfig(format="resume-stream: %(message)s")
    try:
        if command == "publish":
            return asyncio.run(publish(url, token, thread, str(message), sys.stdin.buffer))
        return asyncio.run(tail(url, token, thread, message, flags.get("after"), flags.get("wait", False)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        complain("This takes httpx; install it with: pip install 'resume-stream[client]'")
        return 1


async def publish(url: str, token: str | None, thread: str, message: str, stdin: BinaryIO) -> int:
    """Store UTF-8 from a file, pipe or terminal as it comes, and complete the message at its end.

    SIGINT and SIGTERM abort the message; a second one does not wait for that. The exit status is
    0, or 1 with one line on standard error, or 128 and the number of the signal.
    """
    loop = asyncio.get_running_loop()
    caught: list[int] = []
    storing = loop.create_task(stored(url, token, thread, message, stdin))

    def stop(number: int) -> None:
        caught.append(number)
        storing.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        await asyncio.wait([storing])
    except asyncio.CancelledError:
        storing.cancel()
        await asyncio.wait([storing])
        raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    if storing.cancelled():
        return 128 + caught[0]
    return storing.result()


async def stored(url: str, token: str | None, thread: str, message: str, stdin: BinaryIO) -> int:
    from . import Client, ClientError

    try:
        async with Client(url, token) as client:
            await client.store(thread, message, text_of(stdin))
    except asyncio.CancelledError as error:
        complain(*getattr(error, "__notes__", ()))
        raise
    except (ClientError, OSError, ValueError) as error:
        return failed(error)
    return 0


async def text_of(stdin: BinaryIO) -> AsyncIterator[str]:
    """Text as it comes. Raises UnicodeDecodeError where it is not UTF-8, or ends in the middle of a character."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    while True:
        await readable(stdin.fileno())
        # Not by way of the file object: that could wait for more than is there, and holds a lock at exit.
        piece = os.read(stdin.fileno(), PIECE)
        if text := decode(piece, final=not piece):
            yield text
        if not piece:
            return


async def readable(file: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(file, ready.set)
    except PermissionError:
        return  # epoll takes no regular files, which never make anyone wait
    try:
        await ready.wait()
    finally:
        loop.remove_reader(file)


async def tail(
    url: str,
    token: str | None,
    thread: str,
    message: str | None = None,
    after: str | None = None,
    wait: bool = False,
    stdout: BinaryIO | None = None,
) -> int:
    """Write content as it comes, to standard output if to nothing else.

    The exit status is 0 where the last message to end was completed (or nothing came, as all was
    read before), else 1 with one line on standard error.
    """
    from . import Client, ClientError

    output = stdout or sys.stdout.buffer
    status = 0
    try:
        async with Client(url, token) as client, aclosing(client.read(thread, message, after, wait=wait)) as items:
            async for item in items:
                status = shown(item, output, status)
    except BrokenPipeError:
        # Whoever read it has gone, and what is buffered cannot be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        return 128 + signal.SIGPIPE
    except (ClientError, OSError, ValueError) as error:
        return failed(error)
    return status


def shown(item: Item, output: BinaryIO, status: int) -> int:
    """Show an item; the exit status if it is the last."""
    from . import MessageEnd, StoredChunk

    match item:
        case StoredChunk(content):
            output.write(content.encode())
            output.flush()
            return status
        case MessageEnd(message, "aborted", reason):
            complain(f"The message {message!r} was aborted{f' ({reason})' if reason else ''}.")
            return 1
        case MessageEnd():
            return 0
    complain("The thread was made again; all of it follows.")
    return 0


def failed(error: BaseException) -> int:
    complain(str(error), *getattr(error, "__notes__", ()))
    return 1


def complain(*sentences: str) -> None:
    if sentences:
        print("resume-stream:", " ".join(" ".join(sentences).split()), file=sys.stderr)
