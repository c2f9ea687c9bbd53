"""Draws the rooms of the house and the arrows between them, as the files' imports make them.

    python tools/rooms.py [--out docs/rooms.png]

Needs matplotlib only. ``tests/packaging/test_rooms.py`` holds the imports to ORDER."""

import argparse
import ast
import textwrap
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sisa_kernels", "sisa_model", "bench", "tests")
# From the bottom to the top: a room may import only from rows before its own. What stands right in
# sisa_model/, the command line and the doors hf and adapt, is the room cli.
ORDER = (
    ("sisa_kernels",),
    ("utils",),
    ("models", "data", "reporting"),
    ("interop", "runs"),
    ("training", "evaluation"),
    ("experiments",),
    ("cli",),
    ("bench",),
    ("tests",),
)

# The picture: the centre (x, y) and the width of each box, in hundredths of the page's width.
PLACES = {
    "bench": (27, 114, 38),
    "tests": (73, 114, 38),
    "cli": (40, 99, 20),
    "experiments": (55, 88, 40),
    "training": (46, 75, 31),
    "evaluation": (80, 75, 32),
    "interop": (16, 61, 22),
    "runs": (46, 61, 24),
    "models": (20, 45, 31),
    "data": (53, 45, 23),
    "reporting": (84, 45, 18),
    "utils": (53, 31, 17),
    "sisa_kernels": (20, 12.7, 31),
    "sisa_kernels.distributed": (45, 12.7, 16),
    "sisa_kernels.paths": (61, 12.7, 12.5),
    "sisa_kernels.triton": (75.5, 12.7, 14),
    "sisa_kernels.testing": (90, 12.7, 12),
    "csrc": (50, 0, 38),
}
CAPTIONS = {
    "bench": ["speed, accuracy, their rows and figures"],
    "tests": ["the same rooms again, and support"],
    "csrc": ["the compiled extension, for CPUs and CUDA"],
}
FRAMES = {"sisa_model": (25, 106), "sisa_kernels": (5.4, 23.2)}  # each from y to y
BETWEEN_FRAMES = ((27, 110.8, 106), (73, 110.8, 106), (50, 25, 23.2), (50, 5.4, 3.2))  # x, y to y
COLOURS = ("#e4e9f1", "#dfeaf6", "#dcefeb", "#e8f2d9", "#fbf2d5", "#fae4d4", "#f4dee5")
INK = "#27364a"


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the packages by its dotted name; a package's is its ``__init__``."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: Collection[str]) -> set[str]:
    """Those of the ``known`` modules that a file imports anywhere in it, lazily or for types only.

    ``from package import name`` imports ``package.name`` where that is a module. Raises ValueError
    for a relative import.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: imports are absolute here")
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & set(known) or {str(node.module)}
    return names & set(known)


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """The modules that each module imports."""
    known = modules(root)
    return {name: imported(path, known) - {name} for name, path in known.items()}


def room_of(module: str) -> str:
    """The room a module stands in: a folder of sisa_model, cli right in it, else its package."""
    package, *inner = module.split(".")
    if package != "sisa_model":
        return package
    return inner[0] if inner and (ROOT / package / inner[0]).is_dir() else "cli"


def between_rooms(files: Mapping[str, set[str]]) -> dict[str, dict[str, list[str]]]:
    """The rooms that each room imports from, with the lines ``file -> file`` that do."""
    arrows: dict[str, dict[str, list[str]]] = {room_of(module): {} for module in files}
    for module, targets in files.items():
        for target in targets:
            if room_of(module) != room_of(target):
                pairs = arrows[room_of(module)].setdefault(room_of(target), [])
                pairs.append(f"{module} -> {target}")
    return arrows


def back_up(rooms: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """The imports that do not lead to a lower row of ORDER."""
    row = {room: n for n, names in enumerate(ORDER) for room in names}
    wrong = []
    for room, targets in rooms.items():
        for target, pairs in targets.items():
            wrong += pairs if row[target] >= row[room] else []
    return wrong


def levels(graph: Mapping[str, Collection[str]]) -> dict[str, int]:
    """The level of each node, one above the highest that it points to.

    Raises ValueError for a circle, naming it."""
    found: dict[str, int] = {}

    def visit(node: str, way: tuple[str, ...]) -> int:
        if node in way:
            raise ValueError("circle: " + " -> ".join((*way[way.index(node) :], node)))
        if node not in found:
            found[node] = 1 + max(
                (visit(target, (*way, node)) for target in graph.get(node, ())), default=-1
            )
        return found[node]

    for node in graph:
        visit(node, ())
    return found


def direct(graph: Mapping[str, Collection[str]]) -> list[tuple[str, str]]:
    """The arrows that no longer way replaces (the transitive reduction; no circles)."""

    def reached(node: str) -> set[str]:
        return set(graph[node]).union(*(reached(target) for target in graph[node]))

    return [
        (start, end)
        for start, targets in graph.items()
        for end in targets
        if not any(end in reached(other) for other in targets)
    ]


def inside(rooms: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """The rooms of sisa_model and their arrows to each other."""
    own = [room for room in rooms if room not in PACKAGES]
    return {room: [target for target in rooms[room] if target in own] for room in own}


def box_text(files: Collection[str]) -> dict[str, list[str]]:
    """The lines in each box of the picture: the names of its files."""
    names = defaultdict(list)
    for module in sorted(files):
        folder, _, name = module.rpartition(".")
        if not name.startswith("_") and not (ROOT / module.replace(".", "/")).is_dir():
            box = folder if folder.startswith("sisa_kernels") else room_of(module)
            names[box].append(name)
    lines = {
        box: textwrap.wrap("   ".join(names[box]), int(1.25 * width))
        for box, (_, _, width) in PLACES.items()
    }
    return lines | CAPTIONS


def draw(files: Mapping[str, set[str]], out: Path) -> None:
    """Draw the boxes, and within sisa_model the arrows that no longer way replaces."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(figsize=(9.5, 11.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(-5, 119))
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, colour: str) -> None:
        corner = (x - width / 2, y - height / 2)
        style = "round,pad=0,rounding_size=1"
        axes.add_patch(FancyBboxPatch(corner, width, height, style, fc=colour, ec=INK, lw=0.9))

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}
        axes.annotate("", end, start, arrowprops=style | {"color": INK, "lw": 1.2})

    for title, (low, high) in FRAMES.items():
        box(50, (low + high) / 2, 96, high - low, "#fafbfc")
        axes.text(4, high - 1, title, size=13, weight="bold", color=INK, va="top")

    text = box_text(files)
    height = {name: 4.7 + 1.72 * len(lines) for name, lines in text.items()}
    row = {room: n for n, rooms in enumerate(ORDER) for room in rooms}
    for name, (x, y, width) in PLACES.items():
        box(x, y, width, height[name], COLOURS[min(row.get(name, 0), len(COLOURS) - 1)])
        title = "operators" if name == "sisa_kernels" else name.rpartition(".")[2]
        top = y + height[name] / 2 - 0.9
        lines = "\n".join(text[name])
        axes.text(x, top, title, size=12, weight="bold", color=INK, ha="center", va="top")
        axes.text(x, top - 2.6, lines, size=8.5, color=INK, ha="center", va="top", linespacing=1.3)

    for start, end in direct(inside(between_rooms(files))):
        (x, y, width), (end_x, end_y, end_width) = PLACES[start], PLACES[end]
        leave = min(max(end_x, x - 0.38 * width), x + 0.38 * width)
        arrive = min(max(leave, end_x - 0.38 * end_width), end_x + 0.38 * end_width)
        arrow((leave, y - height[start] / 2), (arrive, end_y + height[end] / 2))
    for x, y, end_y in BETWEEN_FRAMES:
        arrow((x, y), (x, end_y))
    figure.savefig(out, dpi=160)


def main() -> None:
    """Print the rooms by level and the number of arrows; draw the picture."""
    parser = argparse.ArgumentParser(description="Draw the rooms and the arrows between them.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "rooms.png")
    out = parser.parse_args().out
    files = imports()
    rooms = between_rooms(files)
    level = levels(rooms)
    for n in range(max(level.values()), -1, -1):
        print(f"level {n}:", *sorted(room for room in rooms if level[room] == n))
    own = inside(rooms)
    arrows = sum(len(targets) for targets in own.values())
    drawn = len(direct(own))
    print(f"sisa_model: {len(own)} rooms, {arrows} arrows; drawn {drawn}, which imply the others")
    draw(files, out)


if __name__ == "__main__":
    main()
