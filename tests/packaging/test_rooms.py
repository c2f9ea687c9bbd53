"""The house keeps its plan: which room imports which, and the rules that every file keeps."""

import ast
from pathlib import Path

import pytest

from tests.support import ROOT
from tools.rooms import ORDER, back_up, between_rooms, draw, imports, inside, levels, modules

MAX_LINES = 60
KERNELS = set((ROOT / "sisa_kernels/triton").glob("*kernels.py"))
FOLDERS = ("sisa_kernels", "sisa_model", "bench", "tests", "tools", "examples", "docs")
SOURCES = [ROOT / "setup.py"]
SOURCES += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="module")
def files():
    """The modules that each module imports."""
    return imports()


def named(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def nodes(path: Path, kind):
    """Every node of a kind in a file."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind)]


def test_every_room_has_its_place(files):
    assert set(between_rooms(files)) == {room for rooms in ORDER for room in rooms}


def test_no_arrow_runs_back_up(files):
    assert not back_up(between_rooms(files))


def test_an_arrow_back_up_is_found():
    grown = {
        "sisa_model.utils.files": {"sisa_model.models.config"},
        "sisa_model.models.config": set(),
    }
    assert back_up(between_rooms(grown)) == ["sisa_model.utils.files -> sisa_model.models.config"]


def test_rooms_make_no_circle(files):
    levels(inside(between_rooms(files)))


@pytest.mark.parametrize("package", ["sisa_kernels", "sisa_model"])
def test_files_make_no_circle(package, files):
    """A file that imports its own package's ``__init__`` makes one, too."""
    levels({name: targets for name, targets in files.items() if name.startswith(package)})


def test_a_circle_is_found():
    with pytest.raises(ValueError, match="a -> b -> c -> a"):
        levels({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def defined(path: Path) -> dict[str, str]:
    """The names that a package's ``__init__`` defines, each with what it stands for."""
    names = {}
    for node in nodes(path, ast.ImportFrom):
        names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in nodes(path, (ast.FunctionDef, ast.ClassDef)):
        names[node.name] = "a definition"
    for node in nodes(path, ast.Name):
        if isinstance(node.ctx, ast.Store):
            names[node.id] = "a value"
    return names


def test_the_picture_is_drawn(tmp_path, files):
    draw(files, tmp_path / "rooms.png")
    assert (tmp_path / "rooms.png").stat().st_size > 10_000


def test_no_name_of_a_package_hides_a_module_of_it():
    known = modules()
    for package, path in known.items():
        if path.name == "__init__.py":
            for name, origin in defined(path).items():
                module = f"{package}.{name}"
                assert module not in known or origin == module


def test_the_oracle_shares_nothing_with_what_it_judges(files):
    assert files["sisa_kernels.reference"] <= {"sisa_kernels.checks", "sisa_kernels.inputs"}


def test_no_test_imports_another(files):
    for name, targets in files.items():
        tests = {target for target in targets if target.rpartition(".")[2].startswith("test_")}
        assert not tests, f"{name} imports {tests}"


def test_functions_are_short():
    long = [
        f"{named(path, node)} {node.name}"
        for path in SOURCES
        if path not in KERNELS
        for node in nodes(path, ast.FunctionDef)
        if node.end_lineno - node.lineno >= MAX_LINES
    ]
    assert not long


def test_every_file_says_what_it_is():
    docstrings = {path: ast.get_docstring(ast.parse(path.read_text())) for path in SOURCES}
    assert not [path for path, said in docstrings.items() if not said or said.startswith("TODO")]


def test_a_docstring_begins_with_one_line():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    packages = ("sisa_kernels", "sisa_model", "bench", "tools")
    long = [
        f"{path.relative_to(ROOT)}: {said}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in packages
        for node in nodes(path, kinds)
        if "\n" in (said := (ast.get_docstring(node) or "").partition("\n\n")[0])
    ]
    assert not long


def test_the_formatter_has_every_line():
    marks = ("# fmt: " + "skip", "# fmt: " + "off")
    assert not [path for path in SOURCES if any(mark in path.read_text() for mark in marks)]


def test_only_the_command_lines_print():
    prints = [
        named(path, node)
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in ("sisa_kernels", "sisa_model")
        and path.name not in ("cli.py", "__main__.py")
        for node in nodes(path, ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints


def test_an_import_changes_no_filter_of_warnings():
    """They are the whole process's."""
    changes = [
        named(path, node)
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in ("sisa_kernels", "sisa_model")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("warnings.")
    ]
    assert not changes
