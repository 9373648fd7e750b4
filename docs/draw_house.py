"""Draw ``house.svg``, the picture of the house, from the code: ``python docs/draw_house.py``.

A new extra needs a line in ``KINDS``. Sizes are rounded to hundreds of lines, so that small edits change nothing.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "house.svg"

KINDS = {  # by the extra: what it makes of the service, and what it is, in a few words
    "live": ("fast", "live pages in memory"),
    "express": ("fast", "past the framework"),
    "hot": ("fast", "hot rows, quick commits"),
    "guard": ("strong", "of the file and its reads"),
    "clock": ("strong", "a clock that is set"),
    "elsewhere": ("strong", "other processes' changes"),
    "limits": ("strong", "limits on connections"),
    "packs": ("strong", "ended text, compressed"),
    "erasure": ("strong", "expired text, scrubbed"),
    "operate": ("strong", "check, restore, health"),
    "logs": ("strong", "logs without content"),
    "metrics": ("strong", "Prometheus"),
    "tokens": ("strong", "who may do what"),
    "relay": ("further", "any SSE endpoint"),
    "redis_store": ("further", "threads in Redis"),
    "websocket": ("further", "one socket, many threads"),
    "producing": ("further", "uploads and recording"),
    "raw": ("further", "streams as they came"),
    "copy": ("further", "between the stores"),
    "clients": ("further", "publish and tail"),
    "page": ("further", "page and Swagger UI"),
    "openapi": ("further", "the OpenAPI document"),
    "command_line": ("further", "flags and commands"),
}
HEADINGS = {"fast": "Extras make it fast,", "strong": "make it strong,", "further": "and make it reach further"}
COLOURS = {"fast": "#fdf1dc", "strong": "#e6f4ea", "further": "#eee8f8"}
SEAMS = {
    "mount": "mount(parts): routes, guards, formats, bodies",
    "set_up": "set_up(settings): before the service starts",
    "add_commands": "add_commands(commands): for the shell",
    "KEEPER": "KEEPER: a mixin of the SQLite store",
    "attend": "attend(buffer): adds to the buffer and its tails",
    "store_for": "store_for(settings): another Store",
}

# Pixels
WIDTH, EDGE, GAP = 860, 20, 10
LEFT, RIGHT = 240, 552  # the widths of app.py and of the extras
COLUMNS, ROOM_COLUMNS = 3, 30  # cards in a row, characters in a card's line
CARD, LINE, HEADING, STRIP_GAP = 62, 15, 30, 6
SQUARE, SQUARE_STEP, SQUARES = 5, 7, 7  # a side, a step, and how many stand in a row of a card
OUTSIDE = 58  # the height of what talks to the service

INK, LINE_COLOUR, PALE, GREY = "#1f2d3a", "#4b6a88", "#dbe9f6", "#5b6b7a"
MONO = "ui-monospace, monospace"


class Part(NamedTuple):
    """A piece of code: its name, its lines in hundreds (at least one), its seams, and its files, if it is a folder."""

    name: str
    hundreds: int
    seams: Sequence[str] = ()
    rooms: Sequence[str] = ()


def main() -> None:
    PICTURE.write_text(drawn(ROOT))


# The code


def sections(root: Path) -> list[Part]:
    """Return the sections of app.py, which are headed by a title between two rules."""
    _, *found = re.split(r"^# -{20,}\n# (.+)\n# -{20,}$", (root / "app.py").read_text(), flags=re.MULTILINE)
    return [Part(title, hundreds(text)) for title, text in zip(found[::2], found[1::2], strict=True)]


def extras(root: Path) -> dict[str, Part]:
    """Return the extras by name. Raise ValueError if they are not those of ``KINDS``."""
    files = [path for path in (root / "extras").glob("*.py") if not path.stem.startswith("_")]
    files += (root / "extras").glob("*/__init__.py")
    found = [extra(path) for path in files]
    if wrong := sorted({part.name.strip("/") for part in found} ^ KINDS.keys()):
        raise ValueError(f"KINDS of docs/draw_house.py and extras/ differ in {', '.join(wrong)}")
    return {part.name.strip("/"): part for part in found}


def extra(path: Path) -> Part:
    if path.stem != "__init__":
        return Part(path.stem, hundreds(path.read_text()), seams(path))
    rooms = sorted(path.parent.glob("*.py"))
    text = "".join(room.read_text() for room in rooms)
    return Part(f"{path.parent.name}/", hundreds(text), seams(path), [room.stem for room in rooms if room != path])


def seams(path: Path) -> list[str]:
    """Return the seams of a module: functions that it defines or takes from a file beside it, and a kind of Tail."""
    nodes = ast.parse(path.read_text()).body
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    beside = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1]
    names |= {alias.name for node in beside for alias in node.names}
    bases = [base for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases]
    names |= {base.id for base in bases if isinstance(base, ast.Name)} & {"Tail"}
    return [name for name in SEAMS if name in names]


def hundreds(text: str) -> int:
    return max(1, round(text.count("\n") / 100))


def modules(folder: Path, suffix: str) -> str:
    """Return the names of a folder's modules and folders of modules."""
    files = {path.stem for path in folder.glob(f"*{suffix}") if path.stem != "__init__"}
    folders = {f"{path.parent.name}/" for path in folder.glob(f"*/*{suffix}")}
    return ", ".join(sorted(files | folders))


# The picture


def drawn(root: Path) -> str:
    top = EDGE + OUTSIDE + 40
    right, bottom = kinds(extras(root), WIDTH - EDGE - RIGHT, top)
    legend, height = seam_legend(bottom + 30)
    body = [*outside(root), *service(sections(root), top, bottom), *right, *legend]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title"'
        f' font-family="system-ui, sans-serif" font-size="13" fill="{INK}">'
    )
    title = (
        "The house: app.py with schema.sql is the whole service. Extras import it and make it fast, make it strong, and"
        " make it reach further. client/ and static/ talk to it over HTTP."
    )
    arrow = (
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{LINE_COLOUR}"/></marker></defs>'
    )
    ground = f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#f6f8fa"/>'
    return "\n".join([head, f'<title id="title">{escape(title)}</title>', arrow, ground, *body, "</svg>\n"])


def outside(root: Path) -> Iterator[str]:
    """Draw the clients, which talk to the service over HTTP."""
    width = (WIDTH - 2 * EDGE - GAP) // 2
    told = {
        "client/": ("Python producers and readers", modules(root / "client", ".py")),
        "static/": ("the page and the JavaScript client", modules(root / "static", ".js")),
    }
    for x, (name, (what, files)) in zip((EDGE, EDGE + width + GAP), told.items(), strict=True):
        yield box(x, EDGE, width, OUTSIDE, "#fff")
        yield text(x + 12, EDGE + 24, name, weight=600)
        yield text(x + 68, EDGE + 24, what)
        yield text(x + 12, EDGE + 44, files, size=11, font=MONO, fill=GREY)
    middle, below = EDGE + LEFT // 2, EDGE + OUTSIDE
    yield f'<path d="M{x + 36} {below}v12H{middle}" stroke="{LINE_COLOUR}" stroke-width="1.5" fill="none"/>'
    yield arrow(middle, below, middle, below + 38)
    yield text(middle + 10, below + 28, "HTTP", size=12)


def service(parts: Sequence[Part], top: int, bottom: int) -> Iterator[str]:
    """Draw app.py with a strip for each section, and the file below it."""
    file_height = 46
    end = bottom - file_height - 34
    yield box(EDGE, top, LEFT, end - top, "#fff")
    yield text(EDGE + 12, top + 24, "app.py", weight=600)
    yield text(EDGE + 66, top + 24, "says what is true")
    yield text(EDGE + 12, top + 42, "each part knows only those above it", size=11, fill=GREY)
    first = top + 54
    step = (end - first - 6) / len(parts)
    for number, part in enumerate(parts):
        y = first + number * step
        yield box(EDGE + 10, y, LEFT - 20, step - STRIP_GAP, PALE, "none", 4)
        middle = y + (step - STRIP_GAP) / 2
        yield text(EDGE + 20, middle + 4, part.name)
        yield squares(EDGE + LEFT - 20, middle, part.hundreds)
    middle = EDGE + LEFT // 2
    yield arrow(middle, end, middle, end + 32)
    yield text(middle + 10, end + 21, "SQL", size=12)
    yield box(EDGE, end + 34, LEFT, file_height, "#fff")
    yield text(EDGE + 12, end + 34 + 19, "schema.sql", weight=600)
    yield text(EDGE + 12, end + 34 + 36, "one SQLite file, one process", size=12, fill=GREY)


def kinds(found: dict[str, Part], left: int, top: int) -> tuple[list[str], int]:
    """Draw the extras by their kinds, and return where they end."""
    parts, y = list[str](), top
    width = (RIGHT - (COLUMNS + 1) * GAP) // COLUMNS
    for kind, heading in HEADINGS.items():
        names = [name for name in KINDS if KINDS[name][0] == kind]
        rows = [names[start : start + COLUMNS] for start in range(0, len(names), COLUMNS)]
        heights = [CARD + LINE * max(len(rooms(found[name])) for name in row) for row in rows]
        height = HEADING + sum(heights) + GAP * len(rows)
        parts.append(box(left, y, RIGHT, height, COLOURS[kind], "none"))
        parts.append(text(left + GAP + 2, y + 20, heading, weight=600))
        parts.append(arrow(left, y + height / 2, EDGE + LEFT + 2, y + height / 2))
        card_y = y + HEADING
        for row, card_height in zip(rows, heights, strict=True):
            for column, name in enumerate(row):
                x = left + GAP + column * (width + GAP)
                parts += card(found[name], KINDS[name][1], x, card_y, width, card_height)
            card_y += card_height + GAP
        y += height + GAP
    return parts, y - GAP


def card(part: Part, what: str, x: float, y: float, width: int, height: int) -> Iterator[str]:
    yield box(x, y, width, height, "#fff", stroke="#9db2c6", radius=6)
    yield text(x + 10, y + 19, part.name, weight=600)
    for row, first in enumerate(range(0, part.hundreds, SQUARES)):
        yield squares(x + width - 10, y + 14 + row * SQUARE_STEP, min(SQUARES, part.hundreds - first))
    yield text(x + 10, y + 36, what, size=11)
    yield text(x + 10, y + 52, " ".join(part.seams), size=10, font=MONO, fill=GREY)
    for number, line in enumerate(rooms(part)):
        yield text(x + 10, y + 52 + LINE * (number + 1), line, size=10, fill=GREY)


def rooms(part: Part) -> list[str]:
    """Return the files of a folder, in lines that fit a card."""
    return textwrap.wrap(", ".join(part.rooms), ROOM_COLUMNS)


def seam_legend(y: int) -> tuple[list[str], int]:
    """Explain the seams, the squares, and the arrows, and return the height of the picture."""
    parts = [text(EDGE, y, "The seams", weight=600)]
    column = (WIDTH - 2 * EDGE) // 3
    for number, seam in enumerate(SEAMS.values()):
        name, what = seam.split(": ", 1)
        x, line_y = EDGE + number % 3 * column, y + 20 + number // 3 * 34
        parts.append(text(x, line_y, name, size=11, font=MONO))
        parts.append(text(x, line_y + 14, what, size=11, fill=GREY))
    y += 20 + 34 * 2 + 8
    parts.append(squares(EDGE + SQUARE, y - 4, 1))
    parts.append(text(EDGE + 14, y, "about 100 lines", size=11, fill=GREY))
    parts.append(arrow(EDGE + 128, y - 4, EDGE + 156, y - 4))
    parts.append(text(EDGE + 164, y, "imports, asks, or writes to", size=11, fill=GREY))
    return parts, y + EDGE


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = LINE_COLOUR, radius: int = 8) -> str:
    size = f'x="{x:g}" y="{y:.1f}" width="{width:g}" height="{height:.1f}" rx="{radius}"'
    return f'<rect {size} fill="{fill}" stroke="{stroke}"/>'


def text(x: float, y: float, words: str, *, size: int = 13, weight: int = 400, font: str = "", fill: str = "") -> str:
    style = f' font-size="{size}"' if size != 13 else ""
    style += f' font-weight="{weight}"' if weight != 400 else ""
    style += f' font-family="{font}"' if font else ""
    style += f' fill="{fill}"' if fill else ""
    return f'<text x="{x:g}" y="{y:.1f}"{style}>{escape(words)}</text>'


def squares(right: float, middle: float, count: int) -> str:
    """Draw a square for each hundred lines, up to the right edge."""
    steps = " ".join(
        f"M{right - SQUARE - number * SQUARE_STEP:g} {middle - SQUARE / 2:.1f}h{SQUARE}v{SQUARE}h-{SQUARE}z"
        for number in range(count)
    )
    return f'<path d="{steps}" fill="{LINE_COLOUR}"/>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    path = f"M{x:g} {y:.1f}L{to_x:g} {to_y:.1f}"
    return f'<path d="{path}" stroke="{LINE_COLOUR}" stroke-width="1.5" marker-end="url(#to)"/>'


if __name__ == "__main__":
    main()
