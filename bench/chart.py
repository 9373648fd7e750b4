"""The charts: bars in SVG, for light and dark pages, without scripts or fonts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .results import LOAD, Figure, Line, Row, Samples, Stack, shown

WIDTH, LABEL, BAR = 860, 330, 330  # pixels: the picture, the names, the longest bar
BAR_HEIGHT, STEP, GAP = 14, 20, 16
NAME, WHOLE = 90, 700  # pixels: the name of a stacked bar, the longest stacked bar
ROOM = 30  # pixels of a number
COLOURS = ("#57606a", "#8250df", "#bc4c00", "#cf222e", "#1f6feb", "#1a7f37")  # of the layers, from the bottom up
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; }
.range { stroke: #24292f; }
.ours { fill: #1f6feb; } .other { fill: #8c959f; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .range { stroke: #e6edf3; } .ours { fill: #58a6ff; } .other { fill: #6e7681; }
}
"""


def chart(rows: Sequence[Row]) -> str:
    """Draw the bars of each charted line. Bars of one line share a scale that begins at zero.

    The load's own ceilings are left out: they dwarf the other bars.
    """
    parts: list[str] = []
    y = 8
    for row in rows:
        for line in row.lines:
            if line.charted and isinstance(line.ours, Samples):
                y = _line(parts, y, row, line)
    return _svg("resume-stream beside its peers", STYLE, parts, y)


def layers_chart(stacks: Sequence[Stack]) -> str:
    """Draw a bar for each version with a part for each layer. Bars of one stack share a scale that begins at zero."""
    names = list(dict.fromkeys(name for stack in stacks for bar in stack.bars.values() for name in bar))
    colours = dict(zip(names, COLOURS, strict=False))
    parts: list[str] = []
    y = 8
    for stack in stacks:
        parts.append(_text(0, y + 12, f"{stack.title} ({stack.unit})", "title"))
        y += STEP
        scale = WHOLE / max(sum(bar.values()) for bar in stack.bars.values())
        for name, bar in stack.bars.items():
            parts.append(_text(NAME - 8, y + 20, name, anchor="end"))
            _stacked(parts, y, bar, scale, colours)
            y += 2 * STEP
        y += GAP
    for name, colour in colours.items():
        parts.append(f'<rect x="{NAME}" y="{y + 1}" width="14" height="{BAR_HEIGHT}" rx="2" fill="{colour}"/>')
        parts.append(_text(NAME + 22, y + 12, name))
        y += STEP
    return _svg("what an append and a delivery cost, by layer", STYLE + ".in { fill: #ffffff; }", parts, y + GAP)


def _stacked(parts: list[str], y: int, bar: dict[str, float], scale: float, colours: dict[str, str]) -> None:
    x = float(NAME)
    for name, value in bar.items():
        width = value * scale
        parts.append(
            f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{2 * BAR_HEIGHT}" fill="{colours[name]}">'
            f"<title>{escape(name)}: {shown(value)}</title></rect>"
        )
        if width > ROOM:
            parts.append(_text(x + width / 2, y + 20, shown(value), "in", "middle"))
        x += width
    parts.append(_text(x + 8, y + 20, shown(sum(bar.values())), "title"))


def _svg(title: str, style: str, parts: Sequence[str], height: int) -> str:
    box = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{style}</style>", *parts, "</svg>\n"])


def _line(parts: list[str], y: int, row: Row, line: Line) -> int:
    parts.append(_text(0, y + 12, f"{row.title}: {line.title} ({line.unit})", "title"))
    y += STEP
    figures: dict[str, Figure] = {"resume-stream": line.ours, **line.beside}
    figures = {name: figure for name, figure in figures.items() if not name.startswith(LOAD)}
    longest = max(max(figure.values) for figure in figures.values() if isinstance(figure, Samples))
    for name, figure in figures.items():
        parts.append(_text(LABEL - 8, y + 12, name, anchor="end"))
        if isinstance(figure, Samples):
            _bar(parts, y, figure, BAR / longest, "ours" if name == "resume-stream" else "other")
        else:
            parts.append(_text(LABEL, y + 12, "not measured"))
        y += STEP
    return y + GAP


def _bar(parts: list[str], y: int, figure: Samples, scale: float, kind: str) -> None:
    """Draw a bar up to the median, and a stroke from the least to the most."""
    middle = y + BAR_HEIGHT / 2 + 1
    low, high = LABEL + min(figure.values) * scale, LABEL + max(figure.values) * scale
    width = max(figure.median * scale, 1)
    parts.append(
        f'<rect class="{kind}" x="{LABEL}" y="{y + 1}" width="{width:.1f}" height="{BAR_HEIGHT}" rx="2"/>'
        f'<line class="range" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>'
    )
    parts.append(_text(max(high, LABEL + width) + 8, y + 12, shown(figure.median)))


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
