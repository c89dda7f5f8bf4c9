"""The package as a whole: what importing it costs, what it promises by name, and which room may import which."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import hfdtl_bayes

PACKAGE = Path(hfdtl_bayes.__file__).parent

# What each room may import directly; it may then also import whatever those may. The order of the design, bottom up.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "sample": set(),
    "configuration": {"errors", "files"},
    "traces": {"configuration"},
    "features": {"traces", "configuration"},
    "statistics": {"features", "traces"},
    "model": {"statistics", "features"},
    "transfer": {"model", "statistics", "features"},
    "design": {"replay", "transfer", "model", "features"},
    "replay": {"model", "configuration"},
    "export": {"transfer", "model", "features"},
    "simulation": {"export", "design", "replay", "transfer"},
    "report": {"export", "replay", "design", "transfer"},
    "cli": {"report", "simulation", "export", "sample"},
    "recorder": set(),
    "__init__": {"cli", "sample"},
    "__main__": {"cli"},
}


def below(room: str) -> set[str]:
    found: set[str] = set()
    waiting = list(MAY_IMPORT[room])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += MAY_IMPORT[name]
    return found


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports_of(path: Path) -> set[str]:
    """The rooms of this package that a module imports, wherever in the module the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the package imports by full name"
            names = [node.module or ""]
            if node.module == "hfdtl_bayes":
                names = [f"hfdtl_bayes.{a.name}" for a in node.names if a.name != "__version__"]
        found |= {n.split(".")[1] for n in names if n.startswith("hfdtl_bayes.")}
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_place_in_the_plan():
    assert {room_of(p) for p in MODULES} <= set(MAY_IMPORT)


def test_plan_has_no_circle():
    assert all(room not in below(room) for room in MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path):
    room = room_of(path)
    upwards = imports_of(path) - below(room) - {room}
    assert not upwards, f"{path.name} in {room} imports {sorted(upwards)}, which lie above or beside it"


def test_imports_of_finds_an_import_inside_a_function(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text("import os\ndef f():\n    from hfdtl_bayes.cli.app import app\n    import hfdtl_bayes.model.priors\n")
    assert imports_of(path) == {"cli", "model"}


def test_no_module_is_called_after_nothing():
    assert not {p.stem for p in MODULES} & {"utils", "helpers", "common", "misc"}


def loaded_by(code: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


HEAVY = {"pymc", "arviz", "pytensor", "nutpie", "numba", "numpy", "scipy", "pandas", "xarray", "matplotlib"}


def test_import_loads_nothing_heavy():
    heavy = loaded_by("import hfdtl_bayes") & HEAVY
    assert heavy == set()


def test_using_a_public_name_loads_its_room():
    # Also shows that the tests around this one can fail.
    assert {"numpy", "pandas"} <= loaded_by("import hfdtl_bayes\nhfdtl_bayes.fit_donors")


def test_help_loads_nothing_heavy():
    code = (
        "import sys, io, contextlib\nfrom hfdtl_bayes.cli import main\n"
        "for words in (['--help'], ['fit', '--help'], ['verdict', '--help'], ['demo', '--help']):\n"
        "    sys.argv = ['hfdtl-bayes', *words]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main()\n"
    )
    heavy = loaded_by(code) & HEAVY
    assert heavy == set()


def test_public_names_load_from_where_type_checkers_see_them():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted([*seen, "__version__"]) == sorted(hfdtl_bayes.__all__)
    for name, module in seen.items():
        assert getattr(hfdtl_bayes, name) is getattr(importlib.import_module(module), name), name
    assert set(hfdtl_bayes.__all__) <= set(dir(hfdtl_bayes))


def test_unknown_public_name_lists_those_known():
    with pytest.raises(AttributeError, match=r"no attribute 'fit_doners'.*fit_donors"):
        hfdtl_bayes.fit_doners  # noqa: B018


def test_version_is_the_installed_one():
    assert hfdtl_bayes.__version__ == importlib.metadata.version("hfdtl-bayes")
