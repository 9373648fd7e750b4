#!/usr/bin/env python3
"""Build the service as one file, ``dist/resume-stream``, which needs no Python where it runs::

    python3.11 deploy/build_binary.py

It makes an environment of its own in ``build/`` and installs nothing elsewhere. What it needs is
Python 3.11 or later with venv and libpython3.so, binutils, and a package index: on Debian
``apt-get install python3-venv libpython3.11 binutils``. The binary runs on the architecture it was
built on, where glibc is as old as there or newer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "binary"
DIST = ROOT / "dist"
PYINSTALLER = "pyinstaller>=6.16,<7"
# Nothing is compressed: 2.6 times the size, and a fifth sooner there, as all of it is unpacked at each start.
COMPRESSION_LEVEL = {"PYINSTALLER_ZLIB_COMPRESSION_LEVEL": "0"}

SWAGGER_FILES = ("swagger-ui.css", "swagger-ui-bundle.js", "swagger-ui-standalone-preset.js")

# What is imported somewhere below, and never by the service. A module that is missed here makes
# the binary larger; one too many fails tests/deploy/test_binary.py.
EXCLUDED = (
    *("faker", "polyfactory", "rich", "rich_click", "litestar.cli", "litestar.testing", "litestar_htmx"),
    *("jinja2", "packaging", "swagger_ui.core", "swagger_ui.utils"),
    *("pygments", "setuptools", "pkg_resources", "mypy", "pytest", "tkinter", "readline", "lzma", "bz2"),
)

# Named only in strings: by uvicorn's "auto" settings, by find_spec, and by app.py, which looks for its extras.
HIDDEN = (
    *(
        ".".join(["resume_stream", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        for path in sorted((ROOT / "extras").rglob("*.py"))
    ),
    "resume_stream.client.connection",
    "resume_stream.client.command_line",
    *("uvicorn.loops.uvloop", "uvicorn.protocols.http.httptools_impl", "uvicorn.lifespan.off"),
    *("uvicorn.protocols.websockets.websockets_impl", "uvicorn.protocols.websockets.websockets_sansio_impl"),
    "swagger_ui",
)


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env={**os.environ, **COMPRESSION_LEVEL})


def environment() -> Path:
    """A virtual environment with the service's dependencies and PyInstaller; the path of its Python."""
    folder = BUILD / "venv"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True, clear=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["redis"]]
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PYINSTALLER, *needed)
    return python


def package() -> Path:
    """The package as the wheel has it, and a script that starts it, in a folder of their own; the script."""
    folder = BUILD / "package"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("extras", "client"):
        shutil.copytree(ROOT / name, folder / "resume_stream" / name)
    for name in ("__init__.py", "app.py"):
        shutil.copy(ROOT / name, folder / "resume_stream")
    script = folder / "start.py"
    script.write_text("import sys\n\nfrom resume_stream.app import main\n\nsys.exit(main())\n")
    return script


def build(python: Path, layout: str) -> Path:
    """Run PyInstaller; the path of the binary."""
    script = package()
    target = DIST if layout == "onefile" else DIST / "onedir"
    swagger = next(folder for folder in python.parent.parent.glob("lib/python*/site-packages/swagger_ui/static"))
    data = {ROOT / "schema.sql": "resume_stream", ROOT / "static": "resume_stream/static"}
    data |= {swagger / name: "swagger_ui/static" for name in SWAGGER_FILES}
    options = ["--name=resume-stream", f"--{layout}", "--strip", "--noconfirm", "--clean", "--log-level=WARN"]
    options += [f"--distpath={target}", f"--workpath={BUILD}", f"--specpath={BUILD}", f"--paths={script.parent}"]
    options += [f"--runtime-hook={ROOT / 'deploy' / 'die_with_parent.py'}"] if layout == "onefile" else []
    options += [f"--add-data={path}:{place}" for path, place in data.items()]
    options += [f"--exclude-module={name}" for name in EXCLUDED]
    options += [f"--hidden-import={name}" for name in HIDDEN]
    run(python, "-m", "PyInstaller", *options, script)
    return target / "resume-stream" if layout == "onefile" else target / "resume-stream" / "resume-stream"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--onedir",
        action="store_const",
        const="onedir",
        default="onefile",
        dest="layout",
        help="a folder, dist/onedir/resume-stream, in place of one file: starts faster, and unpacks nothing",
    )
    binary = build(environment(), parser.parse_args().layout)
    print(f"{binary.relative_to(ROOT)}: {binary.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
