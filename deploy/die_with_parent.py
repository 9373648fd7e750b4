"""Runs first in the onefile binary: ends with the process that unpacked it.

That process is the one that a person or a supervisor sees. It passes signals on, but SIGKILL it
cannot, and the service would be left running, with the port and the database.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import threading


def watch(parent: int) -> None:
    select.select([parent], [], [])
    shutil.rmtree(sys._MEIPASS, ignore_errors=True)  # where the binary was unpacked
    os.kill(os.getpid(), signal.SIGKILL)


with contextlib.suppress(OSError):  # Linux before 5.3 has no pidfd
    threading.Thread(target=watch, args=[os.pidfd_open(os.getppid())], daemon=True).start()
