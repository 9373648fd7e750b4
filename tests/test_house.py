"""The house: app.py stands alone, extras know nothing of one another, and no file grows unseen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from resume_stream import app

FOLDER = ROOT / "extras"
FILES = sorted(FOLDER.rglob("*.py"))  # an extra is a file, or a package of rooms
ROOMS = {"redis_scripts": "redis_store", "redis_wire": "redis_store"}  # files that are rooms of an extra beside them
MOST_LINES = 3_300  # of app.py
MOST_LINES_OF_AN_EXTRA = 500
OVER = {"redis_store.py": 700, "redis_scripts.py": 600}  # files that are over it today


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def extra_of(path: Path) -> str:
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the full names of the modules that a file imports, each with a name from it."""
    package = ["resume_stream", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).removesuffix(".")
            yield from ((module, alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_an_extra_imports_no_other_one_and_no_name_with_an_underscore(path: Path) -> None:
    used = {name for module, name in imported(path) if module == "resume_stream.app"}
    assert used or path.parent != FOLDER
    assert not {name for name in used if name.startswith("_") and name != "__version__"}
    own = f"resume_stream.extras.{extra_of(path)}"
    others = {module for module, _ in imported(path) if not f"{module}.".startswith(f"{own}.")}
    rooms = {f"resume_stream.extras.{room}" for room, extra in ROOMS.items() if extra == extra_of(path)}
    inside = {module for module in others if module.startswith("resume_stream")} - rooms
    assert inside <= {"resume_stream.app", "resume_stream.client"}


def test_every_extra_is_mounted() -> None:
    assert {*app.EXTRAS, *app.STORES.values()} - {"dialects"} == {extra_of(path) for path in FILES} - ROOMS.keys()


def test_app_imports_no_file_beside_it() -> None:
    beside = {path.stem for path in ROOT.iterdir()} | {"resume_stream"}
    assert not {module.partition(".")[0] for module, _ in imported(ROOT / "app.py")} & beside


def test_no_file_is_longer_than_it_may_be() -> None:
    """Who makes one longer says so here."""
    assert lines(ROOT / "app.py") <= MOST_LINES
    assert {
        name_of(path): lines(path) for path in FILES if lines(path) > OVER.get(name_of(path), MOST_LINES_OF_AN_EXTRA)
    } == {}
