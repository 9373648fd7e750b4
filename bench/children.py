"""Child processes that generate load, with a pipe to each."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from .load import TIMEOUT
from .results import BenchError


@contextlib.contextmanager
def child(work: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Run ``work(pipe, *arguments)`` in a process, and end the process with the block."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_work, args=(work, theirs, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def _work(work: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        work(pipe, *arguments)
    except Exception as error:
        pipe.send(error)


def told(pipe: Connection, what: str, patience: float = TIMEOUT) -> Any:
    """Return the child's next message. Raise BenchError if it failed or is silent."""
    if not pipe.poll(patience):
        raise BenchError(f"{what}: nothing for {patience:.0f} s")
    said = pipe.recv()
    if isinstance(said, Exception):
        raise BenchError(f"{what}: {said}")
    return said
