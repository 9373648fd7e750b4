"""End the service of the onefile binary when the process that unpacked it dies.

People and supervisors see only that process. It passes signals on, but it cannot pass on SIGKILL,
which would leave the service running, with the port and the database.
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
    shutil.rmtree(sys._MEIPASS, ignore_errors=True)  # the folder of the unpacked binary
    os.kill(os.getpid(), signal.SIGKILL)


with contextlib.suppress(OSError):  # Linux before 5.3 has no pidfd
    threading.Thread(target=watch, args=[os.pidfd_open(os.getppid())], daemon=True).start()
