"""The numbers of README.md and docs/benchmarks.md are those of the rows in bench/results."""

import re
import statistics

import pytest

from bench.rows import RESULTS, read
from tests.support import ROOT

D_STATES = (16, 32, 64, 128)
HALF_LIVES = ("100", "14", "5.5", "2.2", "1", "0.33")
KERNEL = "124cf0e"  # the commits whose rows the pages show
DECODING = "02a775e"


@pytest.fixture(scope="module")
def rows():
    """The rows of each file that ran."""
    return {
        path.stem: [row for row in read(path) if row.get("status") == "ok"]
        for path in RESULTS.glob("*.csv")
    }


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def times(rows, commit=KERNEL, **wanted):
    """How many times as fast as its baseline: the median of the rows that match."""
    found = [
        float(row["ratio"])
        for row in rows
        if row["commit"] == commit and all(row[name] == value for name, value in wanted.items())
    ]
    assert found, wanted
    return 1 / statistics.median(found)


def line(name, values):
    return f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |"


@pytest.mark.parametrize(
    ("name", "path", "mode"),
    [
        ("exact, this kernel", "sisa", "exact"),
        ("exact on stock kernels (`chunked`)", "chunked", "exact"),
        ("as published", "eager+sdpa", "clamped"),
        ("plain attention by this kernel", "our plain", "plain, RoPE eager"),
    ],
)
def test_attention(name, path, mode, rows, page):
    shapes = [f"1x2048x12 64+{d_state}/64" for d_state in D_STATES]
    attention = [row for row in rows["attention"] if row["pass"] == "fwd+bwd"]
    found = [times(attention, path=path, mode=mode, shape=shape) for shape in shapes]
    assert line(name, found) in page


@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize(
    ("name", "path"), [("this kernel", "sisa"), ("stock kernels by chunks", "chunked")]
)
def test_attention_by_decay(name, path, length, rows, page):
    shape = f"1x{length}x4 64+16/64"
    modes = [f"exact, half-life {half_life}" for half_life in HALF_LIVES]
    found = [times(rows["decay"], path=path, mode=mode, shape=shape) for mode in modes]
    assert line(f"L {length:,}: {name}", found) in page


@pytest.mark.parametrize(
    ("name", "file", "size", "shape"),
    [
        ("a 152M layer, forward + backward, 1 x 2,048 tokens", "layer", "152m", "1x2048"),
        ("a training step of the tiny model, 8 x 128", "model", "tiny", "8x128 eager"),
        ("the same, 8 x 2,048", "model", "tiny", "8x2048 eager"),
    ],
)
def test_layers_and_steps(name, file, size, shape, rows, page):
    paths = [f"transformer-{size}", f"sisa-{size}-ds16", f"authors-{size}-ds16"]
    assert line(name, [times(rows[file], path=path, shape=shape) for path in paths]) in page


def test_the_step_of_50m(rows, page):
    ours, plain = (
        times(rows["step"], path=f"{x}-50m{y}") for x, y in [("sisa", "-ds16"), ("transformer", "")]
    )
    assert f"| {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |" in page
    before = sorted(
        1 / float(row["ratio"])
        for row in rows["model"]
        if row["path"] == "sisa-50m-ds16" and row["baseline"] == "transformer-50m"
    )
    least, middle, most = (f"{value:.2f}" for value in before)
    assert f"{least}, {middle} and {most}, the median {middle}" in page


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("Transformer, this kernel", "transformer-152m"),
        ("SISA, d_s 16", "sisa-152m-ds16"),
        ("SISA, d_s 32", "sisa-152m-ds32"),
        ("FoX", "fox-152m"),
        ("ALiBi", "alibi-152m"),
        ("Mamba-2 (one of 31 layers, not 12)", "mamba2-152m"),
        ("Mamba-3 (one of 30)", "mamba3-152m"),
    ],
)
def test_decoding(name, path, rows, page):
    found = [
        times(rows["decode"], DECODING, path=path, shape=f"1x{behind}")
        for behind in (512, 4096, 8192)
    ]
    assert line(name, found) in page


def test_memory(rows, page):
    peak = {
        row["path"]: float(row["peak_mib"])
        for row in rows["layer"]
        if (row["commit"], row["shape"]) == (KERNEL, "1x2048")
    }
    stock = peak["stock-transformer-152m"]
    ours, theirs = peak["sisa-152m-ds16"] / stock, peak["authors-152m-ds16"] / stock
    assert f"SISA {ours:.2f}, as published {theirs:.1f}" in page


def test_the_readme(rows):
    text = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    layer = {x: times(rows["layer"], path=f"{x}-152m-ds16") for x in ("authors", "sisa")}
    assert f"at {layer['authors']:.2f} of the Transformer layer's speed; here at " in text
    assert f"here at **{layer['sisa']:.2f}**" in text
    sisa, plain = (times(rows["step"], path=x) for x in ("sisa-50m-ds16", "transformer-50m"))
    assert f"runs at {sisa / plain:.2f} of the Transformer's" in text
