"""Draws the README's figures from bench/results/*.csv (``sisa bench-report``, or ``python
bench/report.py``).

speed.png, growth.png and accuracy.png, each from the newest rows of one device, which its footer
names. A figure that has no rows is not drawn, the command that measures them is printed, and the
command fails."""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.rows import RESULTS, ROOT, read
from sisa_model.reporting.figures import COLORS, save_figure

Row = dict[str, str]
OURS, THEIRS, PLAIN, OTHER, THIRD = COLORS[0], COLORS[1], "0.45", COLORS[2], COLORS[4]
KEY = (
    "op",
    "path",
    "mode",
    "dtype",
    "shape",
    "pass",
    "length",
    "half_life",
)  # of what a row measures
RIVALS = {  # baseline, to its first hyphen: how it is called
    "chain": "the authors' ops",
    "copy": "a copy of its bytes",
    "transformer": "the Transformer's",
    **dict.fromkeys(("flash", "cudnn", "efficient"), "plain attention + RoPE"),
}
PANEL_GAP = 3.5  # between panels, in bars
DOUBLINGS = 3  # of the length, over which a slope is taken
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def newest(rows: Iterable[Row], device: str | None) -> list[Row]:
    """The last row of each measurement on one device, the given or that of the last row: none for
    what was refused since.
    """
    found = list(rows)
    wanted = device or found[-1]["device"] if found else ""
    last = {
        tuple(row.get(column, "") for column in KEY): row
        for row in found
        if wanted in row["device"]
    }
    return [row for row in last.values() if row["status"] == "ok" or "error" in row]


def footer(figure: Any, rows: Sequence[Row], note: str) -> None:
    """What the numbers are and where they were measured, under the figure."""
    places = {f"{row['device']}, threads {row['threads']}, torch {row['torch']}" for row in rows}
    commits, dates = ({row[name] for row in rows} for name in ("commit", "date"))
    measured = (
        f"{'; '.join(sorted(places))}; commit {', '.join(sorted(commits))}; {max(dates)[:10]}"
    )
    figure.supxlabel(f"{note}\n{measured}", fontsize=7, color="0.35", x=0.01, ha="left")


def sizes(row: Row) -> dict[str, int]:
    """The numbers of a shape written as 1x2048x12 64+16/64."""
    left, right = row["shape"].split()
    batch, length, heads = (int(n) for n in left.split("x"))
    width, state = right.partition("/")[0].split("+")
    return {
        "batch": batch,
        "length": length,
        "heads": heads,
        "width": int(width),
        "state_width": int(state),
    }


# ---- Speed ---------------------------------------------------------------------------------------


Bar = tuple[str, str, Row]  # label, colour, row


def bars(axis: Any, rows: Sequence[Bar], title: str) -> None:
    """A bar for each (label, colour, row): how many times as fast as the baseline, with the spread
    of the rounds' ratios.
    """
    for place, (_, color, row) in enumerate(rows):
        speed, fast, slow = (
            1 / float(row[column]) for column in ("ratio", "ratio_p20", "ratio_p80")
        )
        axis.barh(place, speed, 0.72, color=color)
        axis.plot([slow, fast], [place, place], color="black", lw=1, marker="|", ms=4)
        style = {"va": "center", "fontsize": 8, "bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
        axis.annotate(
            f"{speed:.2f}",
            (max(speed, fast, slow), place),
            (5, 0),
            textcoords="offset points",
            **style,
        )
    axis.axvline(1, color="black", lw=0.8, ls=":")
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8)
    axis.set_xlim(0, 1.18 * max(1, axis.dataLim.x1))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    rivals = dict.fromkeys(
        RIVALS.get(row["baseline"].partition("-")[0], row["baseline"]) for _, _, row in rows
    )
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
            "unpadded": ("v not padded", OTHER),
            "eager+sdpa": ("as published", THEIRS),
        },
    ),
}
WHOLE = {"model": "training step", "layer": "one 152M layer", "decode": "a token of one 152M layer"}
FAMILIES = {"sisa": ("SISA", OURS), "authors": ("as published", THEIRS)}
FAMILIES |= {
    "fox": ("FoX", OTHER),
    "alibi": ("ALiBi", OTHER),
    "mamba2": ("Mamba-2", THIRD),
    "mamba3": ("Mamba-3", THIRD),
}


def operator_bars(rows: Sequence[Row], paths: dict[str, tuple[str, str]]) -> list[Bar]:
    order = {"float32": 0, "bfloat16": 1, "float16": 2}
    mine = sorted(
        (row for row in rows if row["path"] in paths),
        key=lambda row: (
            order[row["dtype"]],
            sizes(row)["state_width"],
            list(paths).index(row["path"]),
        ),
    )
    labels = [
        f"{NAMES[row['dtype']]}, d_s {sizes(row)['state_width']}, {paths[row['path']][0]}"
        for row in mine
    ]
    return [(label, paths[row["path"]][1], row) for label, row in zip(labels, mine)]


def model_bars(rows: Sequence[Row]) -> list[Bar]:
    found = []
    for row in sorted(rows, key=lambda row: [int(n) for n in re.findall(r"\d+", row["shape"])]):
        family, scale, *state = row["path"].split("-")
        if family in FAMILIES:
            name, color = FAMILIES[family]
            batch, length = row["shape"].split()[0].split("x")
            scales = [scale] if row["op"] == "model" else []
            tokens = (
                f"behind {int(length):,}"
                if row["op"] == "decode"
                else f"{batch} x {int(length):,} tokens"
            )
            label = ", ".join([*scales, tokens, *(f"d_s {ds[2:]}" for ds in state), name])
            found.append((label, color, row))
    return found


def speed_figure(rows: list[Row], path: Path) -> None:
    """Speed of forward + backward over the rival's, a panel a section; of the operators, at their
    longest length.
    """
    panels: list[tuple[str, list[Bar]]] = []
    for op, (title, paths) in OPERATORS.items():
        mine = [
            row for row in rows if row["op"] == op and row["pass"] == "fwd+bwd" and row["ratio"]
        ]
        longest = max((sizes(row)["length"] for row in mine), default=0)
        panels.append(
            (
                f"{title}, L {longest:,}",
                operator_bars([r for r in mine if sizes(r)["length"] == longest], paths),
            )
        )
    panels += [
        (title, model_bars([row for row in rows if row["op"] == op and row["ratio"]]))
        for op, title in WHOLE.items()
    ]
    panels = [(title, found) for title, found in panels if found]
    split = math.ceil(len(panels) / 2)
    columns = [panels[:split], panels[split:]] if split < len(panels) else [panels]
    heights = [[len(found) for _, found in column] for column in columns]
    tallest = max(sum(height) + PANEL_GAP * len(height) for height in heights)
    figure = plt.figure(figsize=(5.5 * len(columns), 0.22 * tallest + 0.8))
    grid = figure.add_gridspec(1, len(columns))
    for place, (column, height) in enumerate(zip(columns, heights)):
        below = (
            tallest - sum(height) - PANEL_GAP * len(height)
        )  # empty: bars are as thick in every column
        ratios = [*height, below] if below else height
        gap = PANEL_GAP * len(ratios) / sum(ratios)
        inner = grid[place].subgridspec(len(ratios), 1, height_ratios=ratios, hspace=gap)
        for line, (title, found) in enumerate(column):
            bars(figure.add_subplot(inner[line]), found, title)
    figure.suptitle(
        "how many times as fast: forward + backward, a training step with its optimizer",
        fontsize=10,
    )
    footer(
        figure,
        rows,
        "bars: ratio of medians of rounds in which all take turns; lines: 20th to 80th percentile of the rounds' ratios;\n"
        "the 152M Mamba-2 and -3 have 31 and 30 layers, the others 12: a layer of theirs is smaller",
    )
    save_figure(figure, path)


# ---- Growth --------------------------------------------------------------------------------------


def growth_figure(rows: list[Row], path: Path) -> None:
    """Time and peak memory of forward + backward as one size grows and the others stay."""
    styles = {
        "flash": ("plain attention", PLAIN, "s"),
        "sisa": ("SISA, exact", OURS, "o"),
        "eager+sdpa": ("as published", THEIRS, "^"),
    }
    growing = {"length": "length L", "state_width": "d_s", "heads": "heads", "batch": "batch"}
    base = {name: statistics.mode(sizes(row)[name] for row in rows) for name in (*growing, "width")}
    figure, grid = plt.subplots(2, len(growing), figsize=(13, 6), width_ratios=[1.7, 1, 1, 1])
    for column, (name, label) in enumerate(growing.items()):
        mine = [row for row in rows if {**sizes(row), name: base[name]} == base]
        for axis, unit, field, scale in zip(
            grid[:, column], ("time, s", "peak memory, MiB"), ("ms_p50", "peak_mib"), (1e-3, 1.0)
        ):
            for kind, (shown, color, marker) in styles.items():
                points = sorted(
                    (sizes(row)[name], scale * float(row[field]))
                    for row in mine
                    if row["path"] == kind
                )
                if name == "length" and len(points) > DOUBLINGS:
                    (x0, y0), (x1, y1) = points[-1 - DOUBLINGS], points[-1]
                    shown += f", grows as L^{math.log(y1 / y0) / math.log(x1 / x0):.2f}"
                axis.plot(*zip(*points), color=color, marker=marker, ms=4, lw=1.5, label=shown)
            axis.set(xlabel=label, ylabel=unit if column == 0 else "")
            if column == 0:
                axis.set(xscale="log", yscale="log")
                axis.legend(frameon=False, fontsize=8)
            else:
                axis.set(xlim=(0, None), ylim=(0, None))
            axis.xaxis.set_major_locator(FixedLocator(sorted({sizes(row)[name] for row in mine})))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(
                FuncFormatter(lambda x, _: f"{x / 1024:.0f}k" if x >= 1024 else f"{x:.0f}")
            )
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    fixed = ", ".join(f"{label} {base[name]:,}" for name, label in growing.items())
    note = f"attention, fp32, forward + backward; sizes that do not grow: {fixed}, head width {base['width']}; "
    footer(figure, rows, note + f"exponents: over the last {DOUBLINGS} doublings of the length")
    save_figure(figure, path)


# ---- Accuracy ------------------------------------------------------------------------------------


def accuracy_figure(rows: list[Row], path: Path) -> None:
    """Error of y by length, a panel for each dtype and decay."""
    # label, colour, line, marker and how it is drawn: hollow ones first, so that equal errors show
    styles = {
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
    dtypes = [dtype for dtype in NAMES if any(row["dtype"] == dtype for row in rows)]
    lives = sorted({float(row["half_life"]) for row in rows}, reverse=True)
    figure, grid = plt.subplots(
        len(dtypes),
        len(lives),
        figsize=(4 * len(lives), 2.9 * len(dtypes)),
        sharey="row",
        sharex=True,
        squeeze=False,
    )
    lengths = sorted({int(row["length"]) for row in rows})
    for line, dtype in enumerate(dtypes):
        for column, life in enumerate(lives):
            axis = grid[line][column]
            panel = [
                row for row in rows if row["dtype"] == dtype and float(row["half_life"]) == life
            ]
            for kind, (shown, color, line_style, marker) in styles.items():
                mine = sorted(
                    (row for row in panel if row["path"] == kind),
                    key=lambda row: int(row["length"]),
                )
                good = [row for row in mine if row["status"] == "ok"]
                x, y = [int(row["length"]) for row in good], [float(row["error"]) for row in good]
                axis.plot(x, y, color=color, lw=1.5, ls=line_style, label=shown, **marker)
                lost = [int(row["length"]) for row in mine if row["status"] == "not finite"]
                axis.plot(lost, [20.0] * len(lost), color=color, marker="x", ls="", ms=7, mew=2)
            active = [int(row["length"]) for row in panel if float(row["g_range"]) > 22]
            if active:
                axis.axvspan(
                    min(active) / math.sqrt(2),
                    max(lengths) * math.sqrt(2),
                    color=THEIRS,
                    alpha=0.07,
                    lw=0,
                )
            axis.set(
                xscale="log",
                yscale="log",
                xlim=(min(lengths) / math.sqrt(2), max(lengths) * math.sqrt(2)),
            )
            axis.xaxis.set_major_locator(FixedLocator(lengths))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            if line == 0:
                axis.set_title(
                    f"half-life {life:g} tokens"
                    + (" (about that of initialisation)" if life == 100 else ""),
                    fontsize=9,
                )
            if line == len(dtypes) - 1:
                axis.set_xlabel("length L")
            if column == 0:
                axis.set_ylabel(f"{NAMES[dtype]}: relative error of y")
        grid[line][0].set_ylim(top=60)
    grid[0][-1].legend(frameon=False, fontsize=8, loc="center", reverse=True)
    note = "against Eq. 2 in fp64, over the whole tensor; crosses: not finite; shaded: g spans more than 22, the clamp acts"
    footer(figure, rows, note)
    save_figure(figure, path)


# ---- The command ---------------------------------------------------------------------------------

Figure = tuple[tuple[str, ...], Callable[[list[Row], Path], None], str]
FIGURES: dict[str, Figure] = {
    "speed": (("augment", "attention", "layer", "decode", "model"), speed_figure, "pytest bench"),
    "growth": (("growth",), growth_figure, "pytest bench -k growth"),
    "accuracy": (("accuracy",), accuracy_figure, "python bench/accuracy.py"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the figures")
    parser.add_argument(
        "--device",
        help="part of the name of the device whose rows are drawn; default: that of each file's last row",
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
    for name, (files, draw, command) in FIGURES.items():
        if name not in args.only:
            continue
        rows = [
            row for file in files for row in newest(read(args.results / f"{file}.csv"), args.device)
        ]
        if rows:
            args.out.mkdir(parents=True, exist_ok=True)
            draw(rows, args.out / f"{name}.png")
            print(args.out / f"{name}.png")
        else:
            of = f" of {args.device}" if args.device else ""
            print(
                f"{name}.png is not drawn: no rows{of} in {args.results}; `{command}` measures them",
                file=sys.stderr,
            )
            missing = 1
    return missing


if __name__ == "__main__":
    sys.exit(main())
