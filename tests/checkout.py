"""The checkout as the package ``resume_stream``. Run as a script, it is the command ``resume-stream``.

Python keeps the byte code of an imported module, but compiles ``python app.py`` at every start. The first argument may
be ``--without=NAME``: the extra of that name is then as absent as if its file were missing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load_app() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "resume_stream", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec
    assert spec.loader
    module = sys.modules["resume_stream"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    without = sys.argv.pop(1).partition("=")[2] if sys.argv[1].startswith("--without=") else ""
    if without:
        sys.modules[f"resume_stream.extras.{without}"] = None  # type: ignore[assignment]
    sys.exit(load_app().app.main())
