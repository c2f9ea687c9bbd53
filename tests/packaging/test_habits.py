"""What keeps the repository in order: its changelog, its commands, what git sees of them."""

import re
import subprocess
from pathlib import Path

import pytest

from bench.rows import OUT
from sisa_model.commands import COMMANDS
from tests.support import ROOT

KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_the_changelog_is_kept():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    dated = re.compile(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d")
    assert all(dated.fullmatch(version) for version in versions[1:])
    kinds = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    assert set(kinds) <= set(KINDS)
    if len(versions) == 1:
        assert len(kinds) == len(set(kinds)), "each kind has one place in a version"


def recipes():
    """The commands of each target of the Makefile."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "Makefile").read_text().splitlines():
        if target := re.match(r"([a-z]+):", line):
            found[target[1]] = []
        elif line.startswith("\t"):
            found[[*found][-1]].append(line.strip())
    return found


def test_make_ci_and_contributing_run_the_same():
    ours = recipes()
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    run_by_ci = {line.strip().replace(" --quiet", "") for line in ci}
    for target in ("install", "lint", "types", "docs", "test", "slow", "wheel"):
        assert set(ours[target]) <= run_by_ci, target
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for line in ours["install"] + ours["docs"] + ours["types"] + ours["slow"] + ours["bench"]:
        assert line in contributing
    named = re.findall(r"`make ([a-z ]+)`", contributing)
    assert {target for names in named for target in names.split()} <= set(ours)


def test_pre_commit_runs_what_make_runs():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = {
        x.replace(" --force-exclude", "") for x in re.findall(r"^ +entry: (.+)$", text, re.M)
    }
    known = {x.removesuffix(" .") for name in ("lint", "types", "docs") for x in recipes()[name]}
    subject = entries - known
    assert known <= entries
    assert len(subject) == 1
    refused = re.compile(subject.pop().strip("'"))
    assert not refused.search("Triton: a tile a line\n\nWhy.")
    assert refused.search("a tile a line")
    assert refused.search(f"Triton: {72 * 'a'}")


def documented():
    """What the pages' commands write, as far as they name it, and where none is named."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    texts = [page.read_text() for page in pages]
    texts += [line for command in COMMANDS.values() for line in command.examples]
    flags = r"--(?:out|dump-requests|data-dir)[ =]([^\s`)\]|]+)"
    named = {path for text in texts for path in re.findall(flags, text)}
    # Words of a usage stand for somebody's own; docs/*.png are drawn to be committed.
    named = {
        path
        for path in named
        if re.search("[a-z]", Path(path).stem) and not path.startswith(("docs/", "/"))
    }
    own = {"runs/sisa-tiny-ds16/run.json", "runs.png", "runs.html", "docs/_build/index.html"}
    own |= {"dist/x.whl", "build/lib/x.py", "sisa_kernels/libsisa.so", "sisa_kernels/libsisa.txt"}
    own |= {str((OUT / "accuracy.csv").relative_to(ROOT)), ".benchmarks/x", "data/eval/x.jsonl"}
    return {path for path in named if not path.startswith("~")} | own


def test_git_sees_nothing_that_documented_commands_write():
    paths = sorted(
        f"{path}/x" if "." not in path.rpartition("/")[2] else path for path in documented()
    )
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        input="\n".join(paths),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode > 1:
        pytest.skip(f"needs a git checkout: {done.stderr}")
    assert sorted(done.stdout.split()) == paths
