"""The installed package is the checkout, and runs from any folder."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, TIMEOUT


@pytest.fixture(scope="module")
def installed() -> metadata.Distribution:
    try:
        return metadata.distribution("resume-stream")
    except metadata.PackageNotFoundError:
        pytest.skip("resume-stream is not installed in this environment")


@pytest.fixture
def served(installed: metadata.Distribution, tmp_path: Path) -> Iterator[str]:
    command = [Path(sys.executable).with_name("resume-stream"), "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        found = re.search(r"http://\S+:\d+", process.stdout.readline())
        assert found
        yield found[0]
        process.terminate()
        assert process.wait(TIMEOUT) == 0


def test_the_package_has_every_file_of_the_checkout(installed: metadata.Distribution) -> None:
    folders = [ROOT / "extras", ROOT / "static", ROOT / "client"]
    sources = [
        *(ROOT / name for name in ("__init__.py", "app.py", "__main__.py", "schema.sql", "py.typed")),
        *(file for folder in folders for file in folder.rglob("*.*") if file.suffix != ".pyc"),
    ]
    for source in sources:
        copy = Path(str(installed.locate_file(f"resume_stream/{source.relative_to(ROOT)}")))
        assert copy.is_file(), copy
        assert copy.read_bytes() == source.read_bytes(), f"{copy} is old; install the project again"


def test_the_installed_command_serves_the_api_and_the_page(served: str) -> None:
    assert httpx.put(f"{served}/api/threads/t/messages/m").status_code == 201
    assert httpx.get(f"{served}/").status_code == 200
    assert httpx.get(f"{served}/static/resume-stream.js").status_code == 200
    assert httpx.get(f"{served}/schema/assets/swagger-ui.css").status_code == 200
    assert "resume_stream_chunks_in_total" in httpx.get(f"{served}/metrics").text


def test_the_installed_module_has_what_the_design_promises(installed: metadata.Distribution, tmp_path: Path) -> None:
    code = "from resume_stream import ChunkBuffer, Settings, create_app, router"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_package_runs_as_a_module_too(installed: metadata.Distribution, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "resume_stream", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"resume-stream {installed.version}\n", "")


def why_nothing_is_built() -> str:
    """Return why nothing can be built here. A folder build/ in the checkout does not count as the package."""
    missing = [name for name in ("build", "hatchling") if not getattr(importlib.util.find_spec(name), "origin", None)]
    return f"{' and '.join(missing)} not installed" if missing else ""


@pytest.mark.skipif(bool(why_nothing_is_built()), reason=why_nothing_is_built())
def test_an_sdist_makes_a_wheel_that_installs_and_runs(tmp_path: Path) -> None:
    def run(*command: object, **options: Any) -> str:
        words = [sys.executable, "-m", *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=3 * TIMEOUT, check=False, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    run("pip", "install", "--no-deps", "--no-index", "--quiet", "--target", tmp_path / "site", wheel)
    (description,) = (tmp_path / "site").glob("resume_stream-*.dist-info")
    package = tmp_path / "site" / "resume_stream"
    for folder in ("extras", "client", "static"):
        sources = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.*") if path.suffix != ".pyc"}
        assert {path for path in sources if not (package / path).is_file()} == set()
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"resume_stream", description.name, "bin"}
    assert (package / "py.typed").is_file()
    assert (description / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    headers = Parser().parsestr((description / "METADATA").read_text())
    assert headers["License-Expression"] == "MIT"
    assert "client" in headers.get_all("Provides-Extra")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    version = run("resume_stream", "--version", cwd=tmp_path, env=environment)
    assert version == f"resume-stream {headers['Version']}\n"
