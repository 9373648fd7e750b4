"""Notices that somebody set the clock, so that no thread expires and no message is aborted because of it."""

from __future__ import annotations

import logging
import time

from ..app import ChunkBuffer, now_ms

log = logging.getLogger("resume_stream")

STEP_MS = 2_000  # more than a clock drifts between two looks


def attend(buffer: ChunkBuffer) -> None:
    buffer.clock_set_at = Clock().set_at


class Clock:
    def __init__(self) -> None:
        self._offset, self._set_ms = now_ms() - ms_since_boot(), 0

    def set_at(self) -> int:
        """Return when somebody last set the clock, by its new time, in ms since 1970; 0 if nobody did."""
        offset = now_ms() - ms_since_boot()
        if abs(offset - self._offset) > STEP_MS:
            log.warning("the clock was set; nothing expires until its time has passed anew")
            self._offset, self._set_ms = offset, now_ms()
        return self._set_ms


def ms_since_boot() -> int:
    """Return the time of a clock that nobody can set."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1_000_000
