"""Draws the pages' figures, speed.png, growth.png, accuracy.png and clamp.png, of bench/results.

Each is drawn from the newest rows of one device, which its footer names. A figure that has no rows
is not drawn, the command that measures them is printed, and the command fails."""

import argparse
import itertools
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench import authors
from bench.rows import RESULTS, ROOT, read
from sisa_kernels.rotation import CLAMP
from sisa_model.models.presets import find_preset
from sisa_model.reporting.figures import COLORS, save_figure

Row = dict[str, str]
OURS = COLORS[0]
THEIRS = COLORS[1]
PLAIN = "0.45"
OTHER = COLORS[2]
THIRD = COLORS[4]
# What a row measures, and what another row measured again.
KEY = ("op", "path", "mode", "dtype", "shape", "pass", "length", "half_life", "precision", "seed")
RIVALS = {  # baseline, to its first hyphen: how it is called
    "chain": "the authors' ops",
    "copy": "a copy of its bytes",
    "transformer": "the Transformer's",
    "stock": "the Transformer's on stock SDPA",
    "llama": "a Hugging Face Llama's",
    **dict.fromkeys(("flash", "cudnn", "efficient"), "plain attention + RoPE"),
}
PANEL_GAP = 3.5  # between panels, in bars
DOUBLINGS = 3  # of the length, over which a slope is taken
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def newest(rows: Sequence[Row], device: str = "") -> list[Row]:
    """The last row of each measurement on one device: none for what was refused since.

    ``device`` is a part of its name; empty: the device of the last row.
    """
    if not rows:
        return []
    wanted = device or rows[-1]["device"]
    mine = [row for row in rows if wanted in row["device"]]
    last = {tuple(row.get(column, "") for column in KEY): row for row in mine}
    return [row for row in last.values() if row["status"] == "ok" or "error" in row]


def footer(figure: Any, rows: Sequence[Row], note: str) -> None:
    """What the numbers are and where they were measured, under the figure."""
    places = {f"{row['device']}, threads {row['threads']}, torch {row['torch']}" for row in rows}
    commits = {row["commit"] for row in rows}
    day = max(row["date"] for row in rows)[:10]
    measured = f"{'; '.join(sorted(places))}; commit {', '.join(sorted(commits))}; {day}"
    figure.supxlabel(f"{note}\n{measured}", fontsize=7, color="0.35", x=0.01, ha="left")


def sizes(row: Row) -> dict[str, int]:
    """The numbers of a shape written as 1x2048x12 64+16/64."""
    left, right = row["shape"].split()
    batch, length, heads = (int(n) for n in left.split("x"))
    width, state = right.partition("/")[0].split("+")
    operands = {"width": int(width), "d_state": int(state)}
    return {"batch": batch, "length": length, "heads": heads, **operands}


# ---- Speed ---------------------------------------------------------------------------------------

Bar = tuple[str, str, Row]  # label, colour, row


def bars(axis: Any, rows: Sequence[Bar], title: str) -> None:
    """How many times as fast as the baseline each row is, with the spread of the rounds' ratios."""
    style = {"va": "center", "fontsize": 8, "bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
    for place, (_, color, row) in enumerate(rows):
        speed = 1 / float(row["ratio"])
        fast = 1 / float(row["ratio_p20"])
        slow = 1 / float(row["ratio_p80"])
        axis.barh(place, speed, 0.72, color=color)
        axis.plot([slow, fast], [place, place], color="black", lw=1, marker="|", ms=4)
        end = (max(speed, fast, slow), place)
        axis.annotate(f"{speed:.2f}", end, (5, 0), textcoords="offset points", **style)
    axis.axvline(1, color="black", lw=0.8, ls=":")
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8)
    axis.set_xlim(0, 1.18 * max(1, axis.dataLim.x1))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    baselines = [row["baseline"] for _, _, row in rows]
    rivals = dict.fromkeys(RIVALS.get(name.partition("-")[0], name) for name in baselines)
    axis.set_title(f"{title}: over {', '.join(rivals)}", fontsize=9, loc="left")


OPERATORS = {  # section: title, path -> label and colour
    "augment": (
        "augmentation",
        {"extension": ("ours", OURS), "compiled": ("torch.compile of it", OTHER)},
    ),
    "attention": (
        "attention",
        {
            "sisa": ("ours, exact", OURS),
            "our plain": ("our kernel, plain", PLAIN),
            "unpadded": ("v not padded", OTHER),
            "eager+sdpa": ("as published", THEIRS),
        },
    ),
}
WHOLE = {
    "model": "training step",
    "step": "the trainer's step",
    "layer": "one 152M layer",
    "decode": "a token of one 152M layer",
}
FAMILIES = {
    "transformer": ("Transformer, our kernel", PLAIN),
    "sisa": ("SISA", OURS),
    "authors": ("as published", THEIRS),
    "fox": ("FoX", OTHER),
    "alibi": ("ALiBi", OTHER),
    "mamba2": ("Mamba-2", THIRD),
    "mamba3": ("Mamba-3", THIRD),
}


def operator_bars(rows: Sequence[Row], paths: dict[str, tuple[str, str]]) -> list[Bar]:
    """A bar for each row of the given paths, by dtype, then d_s."""

    def place(row: Row) -> tuple[int, int, int]:
        return dtypes.index(row["dtype"]), sizes(row)["d_state"], order.index(row["path"])

    dtypes = ["float32", "bfloat16", "float16"]
    order = list(paths)
    found = []
    for row in sorted((row for row in rows if row["path"] in paths), key=place):
        name, color = paths[row["path"]]
        label = f"{NAMES[row['dtype']]}, d_s {sizes(row)['d_state']}, {name}"
        found.append((label, color, row))
    return found


def decay_bars(rows: Sequence[Row]) -> list[Bar]:
    """A bar for each row of the kernel and of the path by chunks, by length, then half-life."""
    styles = {"sisa": ("ours", OURS), "chunked": ("by chunks", OTHER)}

    def half_life(row: Row) -> float:
        return float(row["mode"].rpartition(" ")[2])

    def place(row: Row) -> tuple[int, float, int]:
        return sizes(row)["length"], -half_life(row), list(styles).index(row["path"])

    found = []
    for row in sorted((row for row in rows if row["path"] in styles), key=place):
        name, color = styles[row["path"]]
        label = f"L {sizes(row)['length']:,}, half-life {half_life(row):g}, {name}"
        found.append((label, color, row))
    return found


def model_bars(rows: Sequence[Row]) -> list[Bar]:
    """A bar for each row of a model, layer or decoding step, by its sizes."""
    found = []
    # Measured beside what the newest are: others are of before a rival was there.
    rival = rows[-1]["baseline"].partition("-")[0] if rows else ""
    rows = [row for row in rows if row["baseline"].startswith(rival)]
    for row in sorted(rows, key=lambda row: [int(n) for n in re.findall(r"\d+", row["shape"])]):
        if row["path"] == row["baseline"]:
            continue
        preset = find_preset(authors.ours(row["path"]))
        family = "authors" if authors.is_theirs(row["path"]) else preset.family
        if family not in FAMILIES:
            continue
        name, color = FAMILIES[family]
        batch, length = row["shape"].split()[0].split("x")
        tokens = f"{batch} x {int(length):,} tokens"
        if row["op"] == "decode":
            tokens = f"behind {int(length):,}"
        parts = [preset.scale] if row["op"] in ("model", "step") else []
        parts.append(tokens)
        if preset.family == "sisa":
            parts.append(f"d_s {preset.model.d_state}")
        found.append((", ".join([*parts, name]), color, row))
    return found


def speed_panels(rows: Sequence[Row]) -> list[tuple[str, list[Bar]]]:
    """Title and bars of each section that has rows; an operator's at its longest length."""
    compared = [row for row in rows if row["ratio"]]
    panels: list[tuple[str, list[Bar]]] = []
    for op, (title, paths) in OPERATORS.items():
        mine = [row for row in compared if row["op"] == op and row["pass"] == "fwd+bwd"]
        longest = max((sizes(row)["length"] for row in mine), default=0)
        mine = [row for row in mine if sizes(row)["length"] == longest]
        panels.append((f"{title}, L {longest:,}", operator_bars(mine, paths)))
    decays = [row for row in compared if row["op"] == "decay"]
    panels.append(("attention, d_s 16, 4 heads, by decay", decay_bars(decays)))
    for op, title in WHOLE.items():
        panels.append((title, model_bars([row for row in compared if row["op"] == op])))
    return [(title, found) for title, found in panels if found]


def speed_figure(rows: list[Row], path: Path) -> None:
    """Speed of forward + backward over the rival's, a panel a section, in two columns."""
    panels = speed_panels(rows)
    split = math.ceil(len(panels) / 2)
    columns = [panels[:split], panels[split:]] if split < len(panels) else [panels]
    heights = [[len(found) for _, found in column] for column in columns]
    tallest = max(sum(height) + PANEL_GAP * len(height) for height in heights)
    figure = plt.figure(figsize=(5.5 * len(columns), 0.22 * tallest + 0.8))
    grid = figure.add_gridspec(1, len(columns))
    for place, (column, height) in enumerate(zip(columns, heights)):
        # Left empty: bars are as thick in every column.
        below = tallest - sum(height) - PANEL_GAP * len(height)
        ratios = [*height, below] if below else height
        gap = PANEL_GAP * len(ratios) / sum(ratios)
        inner = grid[place].subgridspec(len(ratios), 1, height_ratios=ratios, hspace=gap)
        for line, (title, found) in enumerate(column):
            bars(figure.add_subplot(inner[line]), found, title)
    title = "how many times as fast: forward + backward, a training step with its optimizer"
    figure.suptitle(title, fontsize=10, y=1.0, va="bottom")
    footer(
        figure,
        rows,
        "bars: ratio of medians of rounds in which all take turns; "
        "lines: 20th to 80th percentile of the rounds' ratios;\n"
        "the 152M Mamba-2 and -3 have 31 and 30 layers, the others 12: "
        "a layer of theirs is smaller",
    )
    save_figure(figure, path)


# ---- Growth --------------------------------------------------------------------------------------


# path -> label, colour and marker
GROWTH_STYLES = {
    "flash": ("plain attention", PLAIN, "s"),
    "sisa": ("SISA, exact", OURS, "o"),
    "eager+sdpa": ("as published", THEIRS, "^"),
}
GROWING = {"length": "length L", "d_state": "d_s", "heads": "heads", "batch": "batch"}


def with_slope(label: str, points: Sequence[tuple[int, float]]) -> str:
    """The label with the exponent of the growth over the last doublings, where they are there."""
    if len(points) <= DOUBLINGS:
        return label
    (x0, y0), (x1, y1) = points[-1 - DOUBLINGS], points[-1]
    return f"{label}, grows as L^{math.log(y1 / y0) / math.log(x1 / x0):.2f}"


def growth_panel(axis: Any, rows: Sequence[Row], name: str, field: str, scale: float) -> None:
    """A line for each path: ``scale`` times a field of its rows over the size ``name``."""
    for kind, (label, color, marker) in GROWTH_STYLES.items():
        mine = [row for row in rows if row["path"] == kind]
        points = sorted((sizes(row)[name], scale * float(row[field])) for row in mine)
        if name == "length":
            label = with_slope(label, points)
        axis.plot(*zip(*points), color=color, marker=marker, ms=4, lw=1.5, label=label)
    if name == "length":
        axis.set(xscale="log", yscale="log")
        axis.legend(frameon=False, fontsize=8)
    else:
        axis.set(xlim=(0, None), ylim=(0, None))
    axis.xaxis.set_major_locator(FixedLocator(sorted({sizes(row)[name] for row in rows})))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:.0f}k" if x >= 1024 else f"{x:.0f}")
    )
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))


def growth_figure(rows: list[Row], path: Path) -> None:
    """Time and peak memory of forward + backward as one size grows and the others stay."""
    units = {"ms_p50": ("time, s", 1e-3), "peak_mib": ("peak memory, MiB", 1.0)}
    base = {name: statistics.mode(sizes(row)[name] for row in rows) for name in (*GROWING, "width")}
    figure, grid = plt.subplots(2, len(GROWING), figsize=(13, 6), width_ratios=[1.7, 1, 1, 1])
    for column, (name, label) in enumerate(GROWING.items()):
        mine = [row for row in rows if {**sizes(row), name: base[name]} == base]
        for axis, (field, (unit, scale)) in zip(grid[:, column], units.items()):
            axis.set(xlabel=label, ylabel=unit if column == 0 else "")
            growth_panel(axis, mine, name, field, scale)
    fixed = ", ".join(f"{label} {base[name]:,}" for name, label in GROWING.items())
    footer(
        figure,
        rows,
        "attention, fp32, forward + backward; sizes that do not grow: "
        f"{fixed}, head width {base['width']}; "
        f"exponents: over the last {DOUBLINGS} doublings of the length",
    )
    save_figure(figure, path)


# ---- Accuracy ------------------------------------------------------------------------------------

# path -> label, colour, line and marker: hollow ones first, so that equal errors show
ACCURACY_STYLES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "one call": (
        "exact in one stock call (refuses past its range)",
        OTHER,
        "--",
        {"marker": "s", "ms": 9, "mfc": "none"},
    ),
    "without the clamp": (
        "as published, without the clamp",
        THIRD,
        "--",
        {"marker": "D", "ms": 7, "mfc": "none"},
    ),
    "as published": (
        "as published, exponents clamped at 11",
        THEIRS,
        "-",
        {"marker": "^", "ms": 5},
    ),
    "sisa": ("SISA, exact (the default)", OURS, "-", {"marker": "o", "ms": 4}),
}
NOT_FINITE_AT = 20.0  # where the crosses stand


def accuracy_panel(axis: Any, rows: Sequence[Row], limits: tuple[float, float]) -> None:
    """Error of y by length of each path; shaded from the length on at which the clamp acts."""
    for kind, (label, color, line, marker) in ACCURACY_STYLES.items():
        mine = sorted(
            (row for row in rows if row["path"] == kind), key=lambda row: int(row["length"])
        )
        good = [row for row in mine if row["status"] == "ok"]
        x = [int(row["length"]) for row in good]
        y = [float(row["error"]) for row in good]
        axis.plot(x, y, color=color, lw=1.5, ls=line, label=label, **marker)
        lost = [int(row["length"]) for row in mine if row["status"] == "not finite"]
        at = [NOT_FINITE_AT] * len(lost)
        axis.plot(lost, at, color=color, marker="x", ls="", ms=7, mew=2)
    clamped = [int(row["length"]) for row in rows if float(row["g_range"]) > 2 * CLAMP]
    if clamped:
        start = min(clamped) / math.sqrt(2)
        axis.axvspan(start, limits[1], color=THEIRS, alpha=0.07, lw=0)
    axis.set(xscale="log", yscale="log", xlim=limits)


def accuracy_figure(rows: list[Row], path: Path) -> None:
    """Error of y by length, a panel for each dtype and decay."""
    dtypes = [dtype for dtype in NAMES if any(row["dtype"] == dtype for row in rows)]
    half_lives = sorted({float(row["half_life"]) for row in rows}, reverse=True)
    lengths = sorted({int(row["length"]) for row in rows})
    limits = min(lengths) / math.sqrt(2), max(lengths) * math.sqrt(2)
    size = (4 * len(half_lives), 2.9 * len(dtypes))
    shared: dict[str, Any] = {"sharey": "row", "sharex": True, "squeeze": False}
    figure, grid = plt.subplots(len(dtypes), len(half_lives), figsize=size, **shared)
    for line, dtype in zip(grid, dtypes):
        for axis, half_life in zip(line, half_lives):
            at = (dtype, half_life)
            mine = [row for row in rows if (row["dtype"], float(row["half_life"])) == at]
            accuracy_panel(axis, mine, limits)
            axis.xaxis.set_major_locator(FixedLocator(lengths))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        line[0].set_ylabel(f"{NAMES[dtype]}: relative error of y")
        line[0].set_ylim(top=60)
    for axis, half_life in zip(grid[0], half_lives):
        remark = " (about that of initialisation)" if half_life == 100 else ""
        axis.set_title(f"half-life {half_life:g} tokens{remark}", fontsize=9)
    for axis in grid[-1]:
        axis.set_xlabel("length L")
    grid[0][-1].legend(frameon=False, fontsize=8, loc="center", reverse=True)
    note = (
        "against Eq. 2 in fp64, over the whole tensor; crosses: not finite; "
        "shaded: g spans more than 22, the clamp acts"
    )
    footer(figure, rows, note)
    save_figure(figure, path)


# ---- Clamp ---------------------------------------------------------------------------------------

PRECISIONS = {"bf16": "fp32", "bf16-pure": "bf16"}  # of a run: the dtype of its weights
CLAMP_MODES = {"exact": OURS, "clamped": THEIRS}
CLAMP_PANELS: dict[str, tuple[str, tuple[str, ...], str]] = {  # title, columns, scale of the axis
    "loss": ("held-out loss, nats a token", ("loss",), "linear"),
    "half_life": (
        "half-life of heads, tokens:\nleast, median, most",
        ("half_life_least", "half_life_median", "half_life_most"),
        "log",
    ),
    "g_range": ("range of g: median and\nwidest head", ("g_range_median", "g_range_most"), "log"),
    "clamped": ("share of positions at the clamp\n(hollow: would be)", ("clamped",), "linear"),
}


def clamp_panel(axis: Any, rows: Sequence[Row], panel: str) -> None:
    """A column of points, one a seed, for each mode and precision; a bar at their mean."""
    title, columns, scale = CLAMP_PANELS[panel]
    cells = list(itertools.product(PRECISIONS, CLAMP_MODES))
    for place, (precision, mode) in enumerate(cells):
        mine = [row for row in rows if (row["precision"], row["mode"]) == (precision, mode)]
        hollow = panel == "clamped" and mode == "exact"
        face = "none" if hollow else CLAMP_MODES[mode]
        for column in columns:
            values = sorted(float(row[column]) for row in mine)
            if not values:
                continue
            shifts = [place + 0.12 * (n - (len(values) - 1) / 2) for n in range(len(values))]
            axis.scatter(shifts, values, s=22, ec=CLAMP_MODES[mode], fc=face, zorder=3)
            mean = statistics.mean(values)
            axis.plot([place - 0.3, place + 0.3], [mean, mean], color="black", lw=1, zorder=2)
    if panel == "g_range":
        axis.axhline(2 * CLAMP, color="0.3", ls=":", lw=1.2)
        where: dict[str, Any] = {"fontsize": 7, "color": "0.3", "va": "top"}
        axis.annotate("the clamp binds above", (-0.5, 2 * CLAMP * 0.97), **where)
        axis.set_ylim(bottom=CLAMP)
    labels = [f"{mode}\n{PRECISIONS[precision]}" for precision, mode in cells]
    axis.set_xticks(range(len(cells)), labels, fontsize=8)
    axis.set(yscale=scale, xlim=(-0.6, len(cells) - 0.4))
    if scale == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if panel == "clamped":
        axis.set_ylim(0, 1)
    axis.set_title(title, fontsize=9)
    axis.grid(axis="x", visible=False)


def clamp_figure(rows: list[Row], path: Path) -> None:
    """Loss, half-lives, range of g and share at the clamp, by mode and dtype of the weights."""
    figure, grid = plt.subplots(1, len(CLAMP_PANELS), figsize=(13, 3.6))
    for axis, panel in zip(grid, CLAMP_PANELS):
        clamp_panel(axis, rows, panel)
    seeds = len({row["seed"] for row in rows})
    one = rows[-1]
    note = (
        f"SISA, {int(one['parameters']):,} parameters, d_s 16, L {one['length']}, "
        f"{int(one['tokens']):,} tokens of Wikipedia in {one['steps']} steps; "
        f"points: n = {seeds} seeds, lines: their mean; fp32, bf16: dtype of the weights"
    )
    footer(figure, rows, note)
    save_figure(figure, path)


# ---- The command ---------------------------------------------------------------------------------

# name -> the CSV files, what draws it, the command that measures it
Figure = tuple[tuple[str, ...], Callable[[list[Row], Path], None], str]
FIGURES: dict[str, Figure] = {
    "speed": (
        ("augment", "attention", "decay", "layer", "decode", "model", "step"),
        speed_figure,
        "python -m bench cpu",
    ),
    "growth": (("growth",), growth_figure, "python -m bench cpu -k growth"),
    "accuracy": (("accuracy",), accuracy_figure, "python -m bench accuracy"),
    "clamp": (("clamp",), clamp_figure, "python -m bench clamp"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the figures")
    parser.add_argument(
        "--device",
        default="",
        help="part of the name of the device whose rows are drawn; "
        "default: that of each file's last row",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=FIGURES,
        default=[*FIGURES],
        help="figures to draw; default: all",
    )
    args = parser.parse_args(arguments)
    missing = 0
    for name in dict.fromkeys(args.only):
        files, draw, command = FIGURES[name]
        tables = [read(args.results / f"{file}.csv") for file in files]
        rows = [row for table in tables for row in newest(table, args.device)]
        if not rows:
            of = f" of {args.device}" if args.device else ""
            print(
                f"{name}.png is not drawn: no rows{of} in {args.results}; "
                f"`{command}` measures them",
                file=sys.stderr,
            )
            missing = 1
            continue
        args.out.mkdir(parents=True, exist_ok=True)
        draw(rows, args.out / f"{name}.png")
        read_from = ", ".join(f"{file}.csv" for file, table in zip(files, tables) if table)
        print(f"{args.out / name}.png: {len(rows)} rows of {read_from} in {args.results}")
    return missing
