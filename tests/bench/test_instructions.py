"""The kernels' time on paper: steps by brute force, the longest of its parts, the counts."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from bench import instructions
from bench.instructions import Kernel, Loop, attention_seconds, compiled_kernels, over_plain
from bench.roofline import DEVICES, Shape, causal_scores, horizon_tokens, main
from tests.support import ROOT

H200 = DEVICES["H200"]
SHAPE = Shape(16, 2048, 12, 64, 16, 64)


def kernel(m, n, diagonal=16, warps=4, *, instructions=0, exponentials=0):
    loops = dict.fromkeys(("near", "diagonal", "far"), Loop(instructions, exponentials))
    return Kernel(m, n, diagonal, warps, loops)


@pytest.mark.parametrize(("m", "n"), [(32, 16), (16, 32), (32, 32)])
@pytest.mark.parametrize("horizon", [0.0, 1.0, 17.0, 40.5, math.inf])
def test_steps_against_a_count_of_tiles(m, n, horizon):
    """A tile is near where one of its pairs is within the horizon, on the diagonal where one of its
    keys lies past one of its queries, which is walked by smaller steps."""
    length, tiled = 128, kernel(m, n)
    near = diagonal = far = 0
    for row in range(0, length, m):
        for column in range(0, row // n * n, n):
            within = row - (column + n - 1) < horizon
            near += within
            far += not within
        diagonal += (row + m - row // n * n) // 16
    assert instructions.steps_over_keys(length, tiled, horizon) == (near, diagonal, far)
    near = diagonal = far = 0
    for column in range(0, length, n):
        below = -(-(column + n) // m) * m
        for row in range(below, length, m):
            within = row - (column + n - 1) < horizon
            near += within
            far += not within
        diagonal += (min(below, length) - column // m * m) // 16
    assert instructions.steps_over_queries(length, tiled, horizon) == (near, diagonal, far)


def test_a_kernel_takes_the_longest_of_its_parts():
    shape = Shape(1, 128, 1, 64, 16, 64)
    device = replace(H200, terabytes=math.inf)
    cycle = 1 / (132 * instructions.clock(device))  # of one multiprocessor, spread over all

    def seconds(**counts):
        tiled = kernel(64, 64, 64, **counts)  # one near step, two on the diagonal
        return instructions.kernel_seconds("forward", tiled, shape, device, math.inf)

    products = 2 * 3 * 64 * 64 * (64 + 64 + 16) / 4096
    assert instructions.clock(device) == pytest.approx(1.83e9, rel=0.01)
    assert seconds() == pytest.approx(products * cycle)
    assert seconds(instructions=1000) == pytest.approx(3 * 1000 * 4 / 4 * cycle)
    assert seconds(exponentials=500) == pytest.approx(3 * 500 * 4 * 32 / 16 * cycle)
    slow = replace(H200, terabytes=1e-6)
    moved = 128 * (2 * (2 * (64 + 16 + 64) + 16) + 8)
    found = instructions.kernel_seconds("forward", kernel(64, 64), shape, slow, math.inf)
    assert found == pytest.approx(moved / 1e6)


def test_what_the_model_says_at_two_thousand_tokens():
    """Over plain attention, its kernels alone, d_s 16, a half-life of 100 tokens."""
    horizon = horizon_tokens(16, 100)

    def ratio(form, shape=SHAPE):
        return over_plain(form, shape, H200, horizon)[0]

    assert ratio("exact") == pytest.approx(1.5, abs=0.1)
    assert ratio("wide") == pytest.approx((4 * 80 + 3 * 64) / (7 * 64))  # 1.14
    assert ratio("wide, v padded") == pytest.approx(80 / 64)
    long = Shape(2, 16384, 12, 64, 16, 64)
    assert over_plain("far_and_band", long, H200, horizon_tokens(16, 3))[0] < 1.1
    # One multiplication and one exponential a score for the decay, element by element.
    counts = {"forward": 1376, "query": 622, "key": 372}
    by_element = {
        name: replace(one, loops=one.loops | {"near": one.loops["near"]._replace(instructions=n)})
        for (name, one), n in zip(compiled_kernels(90, 64, 16).items(), counts.values())
    }
    took = instructions.exact_seconds(SHAPE, H200, horizon, by_element)
    assert 1.9 < took / instructions.stock_seconds(SHAPE, H200) < 2.3


@pytest.mark.parametrize(("m", "n"), [(32, 16), (16, 32), (32, 32)])
@pytest.mark.parametrize("window", [1, 20, 64])
def test_steps_of_a_band_against_a_count_of_tiles(m, n, window):
    """Of the tiles past the diagonal those with a pair less than ``window`` apart."""
    length, horizon, tiled = 128, 17.0, kernel(m, n)

    def counted(tiles):
        distances = [max(0, row - (column + n - 1)) for row, column in tiles]
        near = sum(distance < min(horizon, window) for distance in distances)
        return near, sum(distance < window for distance in distances) - near

    over_keys = [(i, j) for i in range(0, length, m) for j in range(0, i // n * n, n)]
    found = instructions.steps_over_keys(length, tiled, horizon, window)
    assert (found.near, found.far) == counted(over_keys)
    over_queries = [
        (i, j) for j in range(0, length, n) for i in range(-(-(j + n) // m) * m, length, m)
    ]
    found = instructions.steps_over_queries(length, tiled, horizon, window)
    assert (found.near, found.far) == counted(over_queries)


def test_a_band_alone_where_there_is_nothing_past_it():
    short = replace(SHAPE, length=16)
    band, exact = (attention_seconds(f, short, H200, 1e3) for f in ("far_and_band", "exact"))
    assert band == exact
    moved = instructions.bytes_of("forward", SHAPE, 256) - instructions.bytes_of("forward", SHAPE)
    assert moved == 16 * 12 * (2048 - 256) * (2 * 64 + 4)  # far attention's y and log-sum-exp
    with pytest.raises(ValueError, match="form must be one of exact, far_and_band"):
        attention_seconds("band", SHAPE, H200, 1.0)
    with pytest.raises(ValueError, match="no sm_90 kernels of widths 48"):
        compiled_kernels(90, 48, 16)


@pytest.mark.parametrize(
    ("form", "length", "half_life", "served"),
    [
        ("far_and_band", 4096, 20.0, True),
        ("far_and_band", 4096, 22.0, False),
        ("wide", 4096, 64.0, True),
        ("wide", 4096, 63.0, False),
        ("wide, v padded", 16384, 81.0, False),  # 202 bits
        ("exact", 16384, 1.0, True),
    ],
)
def test_a_form_is_compared_where_it_serves(form, length, half_life, served):
    horizon = horizon_tokens(16, half_life)
    assert instructions.serves(form, length, half_life, horizon) == served


def test_stock_attention_is_counted_in_whole_tiles():
    scores = causal_scores(2048, (128, 128))
    assert instructions.stock_seconds(SHAPE, H200) == pytest.approx(
        2 * 16 * 12 * 7 * 64 * scores / 989e12, rel=1e-3
    )


def test_the_roofline_prints_the_table_on_paper(capsys):
    command = ["--tokens", "2048", "--lengths", "2048", "--d-states", "16"]
    assert main(command) == 0
    out = capsys.readouterr().out
    _, table = out.split("as compiled, on paper\n")
    rows = [line.split() for line in table.splitlines()[2:]]
    assert [row[2] for row in rows] == ["3", "20", "100"]
    far_and_band, wide = ([row[i] == "-" for row in rows] for i in (7, 10))
    assert (far_and_band, wide) == ([False, False, True], [True, True, False])
    assert main([*command, "--head-dim", "48"]) == 0
    assert "none: instructions.csv has no sm_90 kernels" in capsys.readouterr().out


@pytest.mark.slow
def test_the_counts_are_what_this_triton_compiles():
    triton = pytest.importorskip("triton")
    table = (ROOT / "bench" / "instructions.csv").read_text().splitlines()
    if not table[1].startswith(f"{triton.__version__},"):
        pytest.skip(f"the table is another Triton's: {table[1].partition(',')[0]}")
    command = [sys.executable, "tools/resources.py", "--loops", "--arch", "90"]
    command += ["--d-states", "16", "--variants", "plain", "band"]
    command += ["--kernels", "forward", "query", "key"]
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    header, *found = done.stdout.splitlines()
    assert header == table[0]
    assert len(found) == 18
    assert set(found) <= set(table)
