"""Draws every operator of growth: which layer and which coordinate of the target comes from where.

    python tools/draw_operators.py [FOLDER]      FOLDER/NAME.svg of each operator, and operators.svg with all of them

Owns: the drawings in docs/drawings, which a test compares with what this would draw.
Does not own: layer lists and maps, which are those of the operators themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from growth_megatron.growth.operators import registry
from growth_megatron.growth.operators.base import Depth, Operator, Width
from growth_megatron.growth.width import extend, spread

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "drawings"
LAYERS, DEEPER = 4, 6  # not 8: doubled, half of the operators give the same list
COORDINATES, WIDER = 3, 6
CELL_WIDTH, CELL_HEIGHT, PER_ROW = 196, 112, 5
BOX_WIDTH, BOX_HEIGHT, STEP = 24, 11, 13
BOTTOM = 96

STYLE = """
text { font: 9px sans-serif; fill: #1f2328; text-anchor: middle }
.name { font: bold 11px sans-serif; text-anchor: start }
.on { fill: #ffffff }
.side { fill: #656d76; font-size: 8px }
line { stroke: #8c959f; stroke-width: 0.7 }
rect { stroke-width: 1; fill: none }
.s0 { stroke: #0969da } .s1 { stroke: #bc4c00 } .s2 { stroke: #1a7f37 } .s3 { stroke: #8250df } .new { stroke: #656d76 }
.copy.s0 { fill: #0969da } .copy.s1 { fill: #bc4c00 } .copy.s2 { fill: #1a7f37 } .copy.s3 { fill: #8250df }
.zero { stroke-dasharray: 4 2 }
.initial { stroke-dasharray: 1 2 }
.masked { fill: #8c959f; fill-opacity: 0.35; stroke-dasharray: 1 2 }
.mixture { fill: url(#stripes) }
.stripe { stroke: #656d76; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .on { fill: #0d1117 } .side { fill: #9198a1 } line { stroke: #656d76 }
  .s0 { stroke: #58a6ff } .s1 { stroke: #f0883e } .s2 { stroke: #56d364 } .s3 { stroke: #bc8cff }
  .new { stroke: #9198a1 }
  .copy.s0 { fill: #58a6ff } .copy.s1 { fill: #f0883e } .copy.s2 { fill: #56d364 } .copy.s3 { fill: #bc8cff }
  .stripe { stroke: #9198a1 }
}
"""
STRIPES = (
    '<defs><pattern id="stripes" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line class="stripe" x1="0" y1="0" x2="0" y2="5"/></pattern></defs>'
)


@dataclass(frozen=True)
class Box:
    """A layer or a coordinate of the target: its source, or None where it has none; how it is drawn (a CSS class)."""

    source: int | None
    kind: str


def depth_boxes(depth: Depth) -> list[Box]:
    """The target's layers, the lowest first."""
    layers = depth.layers(LAYERS, DEEPER)
    return [_layer(depth, source, is_new=source in layers[:place]) for place, source in enumerate(layers)]


def _layer(depth: Depth, source: int, is_new: bool) -> Box:
    if depth.is_learned:
        return Box(source, "mixture")
    if not is_new or depth.repeats == "copy":
        return Box(source, "copy")
    if depth.repeats == "zero_output":
        return Box(source, "zero")
    return Box(None, "masked" if depth.is_masked else "initial")


def width_boxes(width: Width) -> list[Box]:
    """The target's coordinates."""
    if width.copies:
        return [Box(source, "copy") for source in spread(COORDINATES, WIDER, width.order).index]
    new = "mixture" if width.is_learned else "masked" if width.is_masked else "zero"
    if not (width.closes_with_zeros or width.is_masked or width.is_learned):
        new = "initial"
    index = extend(COORDINATES, WIDER, width.closing).index
    old = "mixture" if width.is_learned else "copy"
    return [Box(source, old) if source >= 0 else Box(None, new) for source in index]


def _box(x: int, number: int, box: Box) -> str:
    y = BOTTOM - (number + 1) * STEP
    color = "new" if box.source is None else f"s{box.source}"
    drawn = f'<rect class="{box.kind} {color}" x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="2"/>'
    if box.source is not None and box.kind != "mixture":
        on = ' class="on"' if box.kind == "copy" else ""
        drawn += f'<text{on} x="{x + BOX_WIDTH // 2}" y="{y + 9}">{box.source}</text>'
    return drawn


def _columns(x: int, what: str, sources: int, boxes: Sequence[Box]) -> list[str]:
    """Source and target side by side, with a line from each source to what comes from it."""
    right = x + 54
    lines = [f'<text class="side" x="{x + 39}" y="{BOTTOM + 10}">{what}</text>']
    for number, box in enumerate(boxes):
        mixed = range(sources) if box.kind == "mixture" else [] if box.source is None else [box.source]
        for source in mixed:
            y1, y2 = (BOTTOM - (place + 1) * STEP + BOX_HEIGHT / 2 for place in (source, number))
            lines.append(f'<line x1="{x + BOX_WIDTH}" y1="{y1}" x2="{right}" y2="{y2}"/>')
    lines += [_box(x, number, Box(number, "copy")) for number in range(sources)]
    return lines + [_box(right, number, box) for number, box in enumerate(boxes)]


def cell(operator: Operator) -> str:
    """The drawing of one operator, without a frame."""
    lines = [f'<text class="name" x="8" y="10">{operator.name}</text>']
    if operator.depth:
        lines += _columns(8, "layers", LAYERS, depth_boxes(operator.depth))
    if operator.width:
        lines += _columns(106 if operator.depth else 8, "coordinates", COORDINATES, width_boxes(operator.width))
    return "\n".join(lines)


def svg(width: int, height: int, title: str, content: str) -> str:
    """A whole file; it follows the reader's light or dark scheme."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return f"{head}\n<title>{title}</title>\n<style>{STYLE}</style>\n{STRIPES}\n{content}\n</svg>\n"


def drawings() -> dict[str, str]:
    """File name to content, of each operator and of all together."""
    operators = registry()
    files = {
        f"{name}.svg": svg(CELL_WIDTH if operator.depth and operator.width else 98, CELL_HEIGHT, name, cell(operator))
        for name, operator in operators.items()
    }
    placed = []
    for number, operator in enumerate(operators.values()):
        row, column = divmod(number, PER_ROW)
        placed.append(f'<g transform="translate({column * CELL_WIDTH} {row * CELL_HEIGHT})">\n{cell(operator)}\n</g>')
    rows = -(-len(operators) // PER_ROW)
    size = (PER_ROW * CELL_WIDTH, rows * CELL_HEIGHT)
    return {**files, "operators.svg": svg(*size, "The operators of growth", "\n".join(placed))}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in drawings().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
