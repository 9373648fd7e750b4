"""``resume-stream publish`` and ``resume-stream tail``: a producer and a reader for the shell.

``add_commands`` adds them to an ``argparse`` parser, and ``run`` runs one. The exit status is 0 if the
message was completed, 128 plus the signal's number after a signal, and 1 otherwise.
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

MAX_READ = 8192  # bytes of one read, far below the usual limit of a chunk
DEFAULT_URL = "http://127.0.0.1:8000"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``publish`` and ``tail`` to the subparsers of an ``argparse`` parser."""
    publishing = commands.add_parser("publish", help="store standard input as a message, as it arrives")
    publishing.add_argument("thread")
    publishing.add_argument("message")
    tailing = commands.add_parser("tail", help="print a message, or all messages of a thread, as they are written")
    tailing.add_argument("thread")
    tailing.add_argument("message", nargs="?")
    tailing.add_argument("--after", help="start after this cursor")
    tailing.add_argument("--wait", action="store_true", help="wait for a thread or message that does not exist yet")
    for added in (publishing, tailing):
        added.set_defaults(run=lambda flags: run(flags["command"], flags))
        added.add_argument("--url", help=f"the URL of the service (default: RESUME_STREAM_URL, or {DEFAULT_URL})")
        added.add_argument("--token", help="the bearer token (default: RESUME_STREAM_TOKEN, not in the process list)")


def run(command: str, flags: Mapping[str, Any]) -> int:
    """Run ``publish`` or ``tail`` with the parsed flags. Return the exit status."""
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
        complain("This command needs httpx; install it with: pip install 'resume-stream[client]'")
        return 1


async def publish(url: str, token: str | None, thread: str, message: str, stdin: BinaryIO) -> int:
    """Store UTF-8 from a file, pipe, or terminal as it arrives, and complete the message at its end.

    SIGINT and SIGTERM abort the message. After a second signal the command does not wait for that.
    Return the exit status. If it is 1, one line on standard error says why.
    """
    loop = asyncio.get_running_loop()
    caught: list[int] = []
    storing = loop.create_task(store(url, token, thread, message, stdin))

    def stop(number: int) -> None:
        caught.append(number)
        storing.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        await asyncio.wait([storing])
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    if storing.cancelled():
        return 128 + caught[0]
    return storing.result()


async def store(url: str, token: str | None, thread: str, message: str, stdin: BinaryIO) -> int:
    from . import Client, ClientError

    try:
        async with Client(url, token) as client:
            await client.store(thread, message, text_of(stdin))
    except asyncio.CancelledError as error:
        complain(*getattr(error, "__notes__", ()))
        raise
    except (ClientError, OSError, ValueError) as error:
        return fail(error)
    return 0


async def text_of(stdin: BinaryIO) -> AsyncIterator[str]:
    """Yield text as it arrives. Raise UnicodeDecodeError if it is not UTF-8, or ends within a character."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    while True:
        await wait_until_readable(stdin.fileno())
        # The file object could wait for more bytes than there are, and it holds a lock at exit.
        piece = os.read(stdin.fileno(), MAX_READ)
        if text := decode(piece, final=not piece):
            yield text
        if not piece:
            return


async def wait_until_readable(file: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(file, ready.set)
    except PermissionError:
        return  # epoll does not take a regular file, which is always readable
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
    """Write content as it arrives, to standard output by default. Return the exit status.

    It is 0 if the last message that ended was completed, or if nothing came after the cursor.
    Otherwise it is 1, and one line on standard error says why.
    """
    from . import Client, ClientError

    output = stdout or sys.stdout.buffer
    status = 0
    try:
        async with Client(url, token) as client, aclosing(client.read(thread, message, after, wait=wait)) as items:
            async for item in items:
                status = show(item, output, status)
    except BrokenPipeError:
        # The reader of the pipe has gone. Without this, Python would flush into the pipe again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        return 128 + signal.SIGPIPE
    except (ClientError, OSError, ValueError) as error:
        return fail(error)
    return status


def show(item: Item, output: BinaryIO, status: int) -> int:
    """Write an item. Return the exit status if it is the last one."""
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
    complain("The thread was created again; all of it follows.")
    return 0


def fail(error: BaseException) -> int:
    complain(str(error), *getattr(error, "__notes__", ()))
    return 1


def complain(*sentences: str) -> None:
    if sentences:
        print("resume-stream:", " ".join(" ".join(sentences).split()), file=sys.stderr)
