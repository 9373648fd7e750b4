"""A proxy between a client and the service that cuts connections where the test says.

``with Cutter(service.port) as cutter`` connects clients of ``cutter.url`` with the service. ``cutter.cut(2, 5)`` cuts
the next connection after two events and five bytes of its answer, and ``cut(0)`` before the first byte. Later
connections stay whole.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Self

import pytest
from conftest import Service


class Cutter:
    def __init__(self, port: int) -> None:
        self._service = port
        self._cuts: deque[tuple[int, int]] = deque()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.connections = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # no client may be connected
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def cut(self, events: int, more: int = 0) -> None:
        self._cuts.append((events, more))

    def _accept(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                cut = self._cuts.popleft() if self._cuts else None
                threading.Thread(target=self._carry, args=[client, cut], daemon=True).start()

    def _carry(self, client: socket.socket, cut: tuple[int, int] | None) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._service)) as service:
            threading.Thread(target=self._forward, args=[client, service], daemon=True).start()
            sent = b""
            while piece := service.recv(65536):
                sent += piece
                if cut is not None and (end := place_of(sent, *cut)) is not None:
                    client.sendall(sent[len(sent) - len(piece) : end])
                    break
                client.sendall(piece)
            for end_of in (client, service):
                end_of.shutdown(socket.SHUT_RDWR)

    def _forward(self, client: socket.socket, service: socket.socket) -> None:
        with suppress(OSError):  # the other side is closed first
            while piece := client.recv(65536):
                service.sendall(piece)
            service.shutdown(socket.SHUT_WR)


def place_of(sent: bytes, events: int, more: int) -> int | None:
    """Return the place so many events and bytes into the answer, or None if it has not come yet."""
    at = 0
    for _ in range(events):
        if (found := sent.find(b"\n\n", at)) < 0:
            return None
        at = found + 2
    return at + more if len(sent) >= at + more else None


@pytest.fixture
def cutter(service: Service) -> Iterator[Cutter]:
    with Cutter(service.port) as cutter:
        yield cutter
