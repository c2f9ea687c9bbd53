"""Data as people have it: files of every kind and spelling, links, damage, corrections."""

import codecs
import gzip
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import sisa_model.data.prepare as prepare_module
from sisa_model.cli import main
from sisa_model.data.corpus import load_corpus, open_data
from sisa_model.data.prepare import PrepareConfig, prepare
from sisa_model.data.shards import Shards
from sisa_model.data.sources import AS_NAMED, START, Reading, file_kind, find_sources, read
from sisa_model.data.text import END_OF_TEXT, find_files
from sisa_model.data.tokenizer import Encoder
from sisa_model.runs.config import TrainConfig, resolve

TEXTS = [f"document {n} says naïve things\nabout {n * n}" for n in range(60)]


def rows(texts=TEXTS, field="text"):
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts))


def written(path, kind):
    """A file of TEXTS in a kind."""
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    elif kind == "text":
        path.write_text("".join(f"{text}\n{END_OF_TEXT}\n" for text in TEXTS))
    else:
        path.write_text(rows())
    return path


def texts_in(path, **reading):
    sources = find_sources((str(path),), reading.pop("format", "auto"))
    return [text for _, text in read(sources, START, "text", **reading)]


def config(source, out, **changes):
    settings = PrepareConfig(
        sources=(str(source),), out=out, tokenizer="bytes", held_out=0.1, workers=1
    )
    return replace(settings, **changes)


def trained_on(corpus):
    """The documents of a corpus of bytes, on both sides."""
    tokens = np.concatenate([corpus.train, corpus.val]).astype(int)
    ends = np.flatnonzero(tokens == Encoder(None).end_of_text)
    pieces = np.split(tokens, ends + 1)
    return sorted(bytes(piece[:-1].tolist()).decode() for piece in pieces if len(piece))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.JSONL", "jsonl"),
        ("a.jsonlines", "jsonl"),
        ("a.NdJson", "jsonl"),
        ("a.Parquet", "parquet"),
        ("A.TXT", "text"),
        ("a.md", "text"),
        ("train.py", "text"),
        ("enwik8", "text"),
    ],
)
def test_every_kind_in_every_case_by_prepare_and_by_train(tmp_path, name, kind):
    path = written(tmp_path / name, kind)
    assert texts_in(path) == TEXTS
    assert trained_on(load_corpus([path], [], Encoder(None))) == sorted(TEXTS)


def test_compressed_in_every_case(tmp_path):
    (tmp_path / "a.JSONL.GZ").write_bytes(gzip.compress(rows().encode()))
    assert texts_in(tmp_path / "a.JSONL.GZ") == TEXTS
    assert trained_on(load_corpus([tmp_path / "a.JSONL.GZ"], [], Encoder(None))) == sorted(TEXTS)


@pytest.mark.parametrize(
    "name", ["a.csv", "a.TSV", "a.pdf", "a.tar.gz", "a.zip", "a.npy", "a.json5"]
)
def test_unknown_kinds_are_refused_by_name_until_said(tmp_path, name):
    path = written(tmp_path / name, "text")
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    for load in (
        lambda: find_sources((str(path),)),
        lambda: load_corpus([path], [], Encoder(None)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be text, .* say with format"):
            load()
    assert texts_in(path, format="text") == TEXTS
    corpus = load_corpus([path], [], Encoder(None), Reading(format="text"))
    assert trained_on(corpus) == sorted(TEXTS)


def test_format_and_field_decide_what_is_read(tmp_path):
    path = tmp_path / "a.md"
    path.write_text(rows(field="content"))
    reading = Reading("content", "jsonl")
    assert trained_on(load_corpus([path], [], Encoder(None), reading)) == sorted(TEXTS)
    held_out = load_corpus([written(tmp_path / "b.txt", "text")], [path], Encoder(None), AS_NAMED)
    assert b'"content"' in bytes(held_out.val[:-1].clip(0, 255).tolist())  # as plain text
    with pytest.raises(ValueError, match=r"text_field must be a field of .*a.md, line 1"):
        load_corpus([path], [], Encoder(None), Reading("text", "jsonl"))
    assert file_kind(path) == "text"


def test_what_reading_says_is_refused_where_it_does_nothing(tmp_path):
    prepare(config(written(tmp_path / "a.jsonl", "jsonl"), tmp_path / "data"))
    for changes in ({"format": "text"}, {"text_field": "content"}, {"skip_bad": True}):
        with pytest.raises(ValueError, match="data must be given with text_field, format or skip"):
            resolve(TrainConfig(**changes))
        reading = TrainConfig(**changes).reading
        with pytest.raises(ValueError, match="text_field, format and skip_bad must be left out"):
            open_data((tmp_path / "data",), (), Encoder(None), 64, 0, reading=reading)


def test_links_are_followed_once(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.txt").write_text("b")
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "a.txt").write_text("a")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (root / "inner" / "up").symlink_to(root)
    (root / "c.txt").symlink_to(elsewhere / "b.txt")
    found = find_files([root])
    assert [str(path.relative_to(root)) for path in found] == ["a.txt", "again/b.txt", "c.txt"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"first\n")
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "first"}\n')
    for path in tmp_path.iterdir():
        assert texts_in(path) == ["first"]
        assert trained_on(load_corpus([path], [], Encoder(None)))[0].startswith("first")


def test_descriptions_beside_data_are_left_out_and_said(tmp_path, caplog):
    written(tmp_path / "train.jsonl", "jsonl")
    for name in ("README.md", "LICENSE", "dataset_card.md", "CHANGELOG", ".gitattributes"):
        (tmp_path / name).write_text("about the data")
    caplog.set_level(logging.INFO)
    assert texts_in(tmp_path) == TEXTS
    left_out = "left out, as they describe the data (name them to take them)"
    assert left_out in caplog.text
    for name in ("README.md", "LICENSE", "dataset_card.md", "CHANGELOG"):
        assert name in caplog.text
    assert f"taken from {tmp_path}: 1 .jsonl" in caplog.text
    caplog.clear()
    assert trained_on(load_corpus([tmp_path], [], Encoder(None))) == sorted(TEXTS)
    assert left_out in caplog.text
    assert "data: 1 .jsonl" in caplog.text
    assert texts_in(tmp_path / "README.md") == ["about the data"]
    (tmp_path / "readme_of_a_novel.txt").write_text("x")
    (tmp_path / "author.txt").write_text("y")
    assert [path.name for path in find_files([tmp_path])] == ["author.txt", "train.jsonl"]
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "author.txt").unlink()
    with pytest.raises(ValueError, match=r"with none but .*README.md, .* which describe it"):
        find_files([tmp_path])


def damaged(folder):
    """Files with 3 bad lines, 2 bad files and 60 + 3 good documents."""
    folder.mkdir()
    good = rows().splitlines(keepends=True)
    good[7:7] = ["not json\n", '{"text": 5}\n']
    lines = [line.encode() for line in good]
    lines.insert(20, b'{"text": "\xff"}\n')
    (folder / "a.jsonl").write_bytes(b"".join(lines))
    (folder / "b.jsonl").write_text(rows(["one", "two", "three"]))
    (folder / "c.jsonl.gz").write_bytes(b"not compressed")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(rows().encode())[:-20])
    return folder


def test_bad_lines_and_files_are_named_or_passed_over_and_counted(tmp_path, caplog):
    folder = damaged(tmp_path / "data")
    with pytest.raises(ValueError, match=r"a.jsonl must hold a JSON object a line, but line 8"):
        prepare(config(folder, tmp_path / "out"))
    shutil.rmtree(tmp_path / "out")
    shards = prepare(config(folder, tmp_path / "out", skip_bad=True))
    ends = sum(int((tokens[:] == 256).sum()) for tokens in (shards.train, shards.val))
    assert ends >= 63
    assert "passed over in all: 5 lines or files" in caplog.text
    assert "line 8 is not" in caplog.text
    caplog.clear()
    corpus = load_corpus([folder], [], Encoder(None), Reading(skip_bad=True))
    assert set(trained_on(corpus)) == {*TEXTS, "one", "two", "three"}
    assert "passed over in all: 5 lines or files" in caplog.text


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\xff", b"a\0b", "naïve".encode("utf-16")])
def test_binaries_are_named(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    (tmp_path / "b.txt").write_text("text\n" * 100)
    for load in (
        lambda: texts_in(path),
        lambda: load_corpus([tmp_path], [], Encoder(None)),
    ):
        with pytest.raises(ValueError, match=r"a.txt is not a (UTF-8 )?text file"):
            load()
    corpus = load_corpus([tmp_path], [], Encoder(None), Reading(skip_bad=True))
    assert len(corpus.train) + len(corpus.val) == 500


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    path = written(tmp_path / "a.txt", "text")

    def refuse(name, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(name))

    monkeypatch.setattr("sisa_model.data.text.open", refuse, raising=False)
    with pytest.raises(PermissionError, match=r"Permission denied: .*a.txt"):
        texts_in(path)
    with pytest.raises(ValueError, match="data holds no text"):
        load_corpus([path], [], Encoder(None), Reading(skip_bad=True))


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A folder that a bad line stopped in its second source, after some shards, and its files."""
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 200)
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text(rows(TEXTS[:20]))
    (data / "b.jsonl").write_text(rows(TEXTS[20:50]) + "no json\n" + rows(TEXTS[50:]))
    (data / "c.jsonl").write_text(rows(["last"]))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"b.jsonl must hold .* line 31 is not"):
        prepare(config(data, out, shard_tokens=300))
    assert len([*out.glob("shard-*")]) >= 3
    return data, out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.bin"))}


def test_a_corrected_line_does_not_cost_the_finished_shards(stopped, tmp_path, monkeypatch):
    data, out = stopped
    first = (out / "shard-00000" / "train.bin").stat()
    (data / "b.jsonl").write_text(rows(TEXTS[20:]))
    (data / "c.jsonl").write_text(rows(["the last, longer"]))
    prepare(config(data, out, shard_tokens=300))
    assert (out / "shard-00000" / "train.bin").stat() == first
    prepare(config(data, tmp_path / "straight", shard_tokens=300))
    assert Shards(out).fingerprint() == Shards(tmp_path / "straight").fingerprint()
    (data / "c.jsonl").write_text(rows(["changed at last"]))
    with pytest.raises(ValueError, match=r"sources must stay .*c.jsonl"):
        prepare(config(data, out, shard_tokens=300))


def test_skip_bad_goes_on_after_the_finished_shards(stopped, tmp_path):
    data, out = stopped
    prepare(config(data, out, shard_tokens=300, skip_bad=True))
    prepare(config(data, tmp_path / "straight", shard_tokens=300, skip_bad=True))
    assert Shards(out).fingerprint() == Shards(tmp_path / "straight").fingerprint()


def test_changes_in_what_shards_hold_are_refused(stopped):
    data, out = stopped
    whole = (data / "a.jsonl").read_text()
    (data / "a.jsonl").write_text(rows(TEXTS[1:20]))
    with pytest.raises(ValueError, match=r"sources must stay .*a.jsonl"):
        prepare(config(data, out, shard_tokens=300))
    (data / "a.jsonl").write_text(whole)
    (data / "b.jsonl").write_text(rows(["another beginning", *TEXTS[21:]]))
    with pytest.raises(ValueError, match=r"source .*b.jsonl must begin with the .* documents"):
        prepare(config(data, out, shard_tokens=300))
    (data / "b.jsonl").write_text(rows(TEXTS[20:22]))
    with pytest.raises(ValueError, match=r"source .*b.jsonl must begin with the .* documents"):
        prepare(config(data, out, shard_tokens=300))


def test_the_command_line_reads_as_it_is_told(tmp_path, capsys):
    path = tmp_path / "a.dat"
    path.write_text(rows(field="body"))
    flags = ["--tokenizer", "bytes", "--held-out", "0.1", "--workers", "1"]
    assert main(["prepare", str(path), "--out", str(tmp_path / "out"), *flags]) == 1
    assert "a.dat must be text, .jsonl or .parquet" in capsys.readouterr().err
    told = ["--format", "jsonl", "--text-field", "body", "--skip-bad"]
    assert main(["prepare", str(path), "--out", str(tmp_path / "out"), *flags, *told]) == 0
