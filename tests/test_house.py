"""The house: app.py stands alone, extras know nothing of one another, and no file grows unseen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from resume_stream import app

EXTRAS = sorted((ROOT / "extras").glob("*.py"))
ROOMS = {"redis_store": ("redis_scripts", "redis_wire")}  # the files of an extra that is in more than one
MOST_LINES = 3_300  # of app.py
MOST_LINES_OF_AN_EXTRA = 500
OVER = {"relay": 1_200, "redis_store": 700, "redis_scripts": 600}  # those that are over it today


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """The modules that a file imports, each with a name from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", EXTRAS, ids=lambda path: path.stem)
def test_an_extra_imports_no_other_one_and_no_name_with_an_underscore(path: Path) -> None:
    used = {name for module, name in imported(path) if module == "app"}
    assert used
    assert not {name for name in used if name.startswith("_") and name != "__version__"}
    others = {module for module, _ in imported(path) if module.startswith(("resume_stream.", "extras", "."))}
    own = {f"resume_stream.extras.{room}" for room in ROOMS.get(path.stem, ())}
    assert others <= {"resume_stream.client", *own}


def test_every_extra_is_mounted() -> None:
    rooms = {room for rooms in ROOMS.values() for room in rooms}
    assert sorted({*app._EXTRAS, *app._KEEPERS, *app._ATTENDANTS, *app._STORES.values(), "command_line", *rooms}) == [
        path.stem for path in EXTRAS
    ]


def test_app_imports_no_file_beside_it() -> None:
    beside = {path.stem for path in ROOT.iterdir()} | {"resume_stream"}
    assert not {module.partition(".")[0] for module, _ in imported(ROOT / "app.py")} & beside


def test_no_file_is_longer_than_it_may_be() -> None:
    """Who makes one longer says so here."""
    assert lines(ROOT / "app.py") <= MOST_LINES
    assert {
        path.stem: lines(path) for path in EXTRAS if lines(path) > OVER.get(path.stem, MOST_LINES_OF_AN_EXTRA)
    } == {}
