"""Draw the rooms of the package and who imports whom, from the imports: `python tools/draw_rooms.py`."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from html import escape
from pathlib import Path
from textwrap import wrap

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import house

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "rooms.svg"

# From the top down: a room imports only rooms below it.
ORDER = [
    *("cli", "training", "averaging", "search", "soup", "layers", "logits", "adapters", "weights"),
    *("tail", "ingredients", "checkpoints", "sharing", "images", "metrics", "recipes", "runtime"),
]

# Pixels: a box, the space between boxes, the page.
WIDTH, HEIGHT, GAP, MARGIN, PAGE = 560, 62, 16, 16, 860
COLORS = (
    *("#0b5394", "#d95f02", "#3d7a3d", "#7b3294", "#8c6d1f", "#1b7a7a", "#7a3d1b", "#4e342e"),
    *("#a03050", "#555555", "#226699", "#444400", "#6a4c93", "#00695c", "#9c4a1a", "#37507a", "#5d6d1e"),
)


def count_imports(modules: list[house.Module]) -> Counter[tuple[str, str]]:
    """How many modules of a room import another room."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, targets in house.import_graph(modules).items():
        room = name.partition(".")[0]
        counts.update({(room, target.partition(".")[0]) for target in targets})
    return Counter({pair: count for pair, count in counts.items() if pair[0] != pair[1] and {*pair} <= {*ORDER}})


def draw(package: Path) -> str:
    """The picture as SVG: a box a room, and an arc to each room that it imports, thicker for more modules."""
    modules = house.read_modules(package)
    places = {room: MARGIN + index * (HEIGHT + GAP) for index, room in enumerate(ORDER)}
    height = MARGIN + len(ORDER) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PAGE} {height}" font-family="sans-serif">',
        f'<rect width="{PAGE}" height="{height}" fill="white"/>',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
        'markerUnits="userSpaceOnUse"><path d="M0,0 L8,4 L0,8 z" fill="#333"/></marker></defs>',
    ]
    for (room, target), count in sorted(count_imports(modules).items()):
        parts.append(_arc(room, target, count, places))
    for room in ORDER:
        parts += _box(package, room, modules, places[room])
    return "\n".join([*parts, "</svg>", ""])


def _box(package: Path, room: str, modules: list[house.Module], top: int) -> list[str]:
    """A room: its name, what it is, and its modules."""
    doc = ast.get_docstring(ast.parse((package / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    names = ", ".join(module.name.partition(".")[2] for module in modules if module.name.startswith(f"{room}."))
    lines, color = [doc, *wrap(names, 100)], _color(room)
    box = [
        f'<rect x="{MARGIN}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#f4f6f8" '
        f'stroke="{color}" stroke-width="1.5"/>',
        f'<text x="{MARGIN + 10}" y="{top + 19}" font-size="14" font-weight="bold" fill="{color}">{room}</text>',
    ]
    for index, line in enumerate(lines):
        style = 'fill="#222"' if index == 0 else 'fill="#555" font-style="italic"'
        text = escape(line)
        box.append(f'<text x="{MARGIN + 10}" y="{top + 36 + 13 * index}" font-size="9.5" {style}>{text}</text>')
    return box


def _arc(room: str, target: str, count: int, places: dict[str, int]) -> str:
    """An arrow on the right of the boxes, from a room down to a room that it imports."""
    start = places[room] + HEIGHT * 0.65
    end = places[target] + HEIGHT * (0.2 + 0.04 * ORDER.index(room))
    right = MARGIN + WIDTH
    reach = right + 24 + 28 * (ORDER.index(target) - ORDER.index(room))
    path = f"M{right},{start:.0f} C{reach},{start:.0f} {reach},{end:.0f} {right + 2},{end:.0f}"
    title = f"<title>{room} imports {target} ({count} modules)</title>"
    width = 0.8 + 0.25 * count
    return (
        f'<path d="{path}" fill="none" stroke="{_color(room)}" stroke-opacity="0.7" stroke-width="{width:.2f}" '
        f'marker-end="url(#head)">{title}</path>'
    )


def _color(room: str) -> str:
    return COLORS[ORDER.index(room)]


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(draw(ROOT / "hf_radin"), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
