"""The checkout as the package ``resume_stream``. Run as a script, it is the command ``resume-stream``.

As most of the cost of a start is that of the imports, ``python checkout.py --fork`` imports everything once. Then it
starts the command in a fork of itself, for each request on the socket that is its standard input.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load_app() -> ModuleType:
    """Import the checkout, whatever else is installed."""
    spec = importlib.util.spec_from_file_location(
        "resume_stream", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec
    assert spec.loader
    module = sys.modules["resume_stream"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve_forks() -> None:
    """Answer each request with the id of a process, which whoever asked has to adopt (PR_SET_CHILD_SUBREAPER)."""
    app = load_app().app
    app.create_app(app.Settings(db=":unused:"))  # which imports all extras
    gc.freeze()
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not request:
            return
        read_end, write_end = os.pipe()
        if not (child := os.fork()):
            if process := os.fork():
                os.write(write_end, str(process).encode())
                os._exit(0)
            for descriptor in (read_end, write_end, requests.detach()):
                os.close(descriptor)
            run(*descriptors, **json.loads(request))
        os.waitpid(child, 0)  # from now on, its child is an orphan
        requests.send(os.read(read_end, 100))
        for descriptor in (read_end, write_end, *descriptors):
            os.close(descriptor)


def run(
    output: int, errors: int, arguments: Sequence[str], environment: Mapping[str, str], folder: str, first: str
) -> None:
    """Be the command, after some code, and exit as it does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    code = 1
    try:
        exec(first)
        code = sys.modules["resume_stream.app"].main(arguments)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:] == ["--fork"]:
        serve_forks()
    else:
        sys.exit(load_app().app.main())
