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
PRODUCTION = [ROOT / "app.py", *FILES, *(ROOT / "client").rglob("*.py")]

# Only ever lower these.
MOST_LINES = 2_800  # of app.py
MOST_NAMES = 100  # of app.py, without an underscore
MOST_LINES_OF_AN_EXTRA = 500
MOST_LINES_OF_A_FUNCTION = 45
MOST_LINES_IN_ALL = 11_300  # of app.py, the extras, and the client


TOP = ast.parse((ROOT / "app.py").read_text()).body


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
    assert not {name for name in used if name.startswith("_") and name != "__version__"}
    own = f"resume_stream.extras.{extra_of(path)}"
    others = {module for module, _ in imported(path) if not f"{module}.".startswith(f"{own}.")}
    inside = {module for module in others if module.startswith("resume_stream")}
    assert inside <= {"resume_stream.app", "resume_stream.client"}


def test_every_extra_is_mounted() -> None:
    names = f"{app._EXTRAS} {app._KEEPERS} {app._ATTENDANTS} command_line"
    listed = {*names.split(), *app._STORES.values()}
    assert listed == {extra_of(path) for path in FILES}


def test_app_imports_no_file_beside_it() -> None:
    beside = {path.stem for path in ROOT.iterdir()} | {"resume_stream"}
    assert not {module.partition(".")[0] for module, _ in imported(ROOT / "app.py")} & beside


def test_no_file_is_longer_than_its_budget() -> None:
    assert lines(ROOT / "app.py") <= MOST_LINES
    assert {name_of(path): lines(path) for path in FILES if lines(path) > MOST_LINES_OF_AN_EXTRA} == {}
    assert sum(map(lines, PRODUCTION)) < MOST_LINES_IN_ALL


def test_no_function_is_longer_than_its_budget() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in PRODUCTION
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: count for name, count in long.items() if count > MOST_LINES_OF_A_FUNCTION} == {}


def test_app_has_few_names_for_others() -> None:
    names = {node.name for node in TOP if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    targets = [target for node in TOP for target in getattr(node, "targets", [getattr(node, "target", None)])]
    names |= {name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)}
    assert len({name for name in names if not name.startswith("_")}) <= MOST_NAMES


def test_app_hides_what_only_app_uses() -> None:
    used = {name for path in FILES for module, name in imported(path) if module == "resume_stream.app"}
    surface = {name for module, name in imported(ROOT / "__init__.py")}
    own = {"Duration", "Size", "Open", "End", "Clear", "AbortBody", "ResumeBody", "BadRows", "main"}
    public = {node.name for node in TOP if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    assert {name for name in public - used - surface - own if not name.startswith("_")} == set()
