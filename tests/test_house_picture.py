"""``docs/house.svg`` shows the house as it is."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from conftest import ROOT


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("draw_house", ROOT / "docs" / "draw_house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_the_script_draws_today(script: Any) -> None:
    assert script.PICTURE.read_text() == script.drawn(ROOT), "run: python docs/draw_house.py"


def test_an_extra_without_a_kind_is_named(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(script.KINDS, "packs")
    with pytest.raises(ValueError, match="differ in packs"):
        script.drawn(ROOT)
