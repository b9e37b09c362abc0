"""The order of imports that pyproject.toml writes down, and no circle among modules."""

from __future__ import annotations

import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dist_train", "data_shards")


@pytest.fixture
def copy(tmp_path):
    """The project's code once more, to plant faults in."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "_resources"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder):
    """import-linter's exit code and what it says of the project in `folder`."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def circle(folder):
    """A circle of modules in `folder`, or None. `from package import module` within a package asks its `__init__`."""
    found = subprocess.run(
        [sys.executable, __file__], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True
    )
    assert not found.returncode, found.stderr.decode()
    return found.stdout.decode().split()


def find_circle():
    graph = grimp.build_graph(*PACKAGES, cache_dir=None, exclude_type_checking_imports=True)
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    for importer, imported in imports.items():
        for other in list(imported):
            package = other.rpartition(".")[0]
            details = graph.get_import_details(importer=importer, imported=other)
            if importer.startswith(f"{package}.") and any(
                f"from {package} import" in d["line_contents"] for d in details
            ):
                imported.add(package)
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_imports_go_downwards_only():
    code, said = lint(ROOT)
    assert code == 0, said
    assert "2 kept, 0 broken" in said


def test_no_module_imports_itself_by_way_of_others():
    assert circle(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dist_train/models/drafter.py", "from dist_train.train.schedule import learning_rate"),
        ("dist_train/evaluate/measures.py", "from dist_train.generate.asks import Ask"),
        ("dist_train/demo/recipe.py", "from dist_train.cli import main"),
        ("dist_train/runtime/world.py", "def late():\n    from dist_train.config import load_config"),
        ("data_shards/order.py", "from dist_train.errors import UserError"),
    ],
)
def test_an_upward_import_is_found(copy, module, line):
    with (copy / module).open("a") as file:
        file.write(f"\n{line}\n")
    code, said = lint(copy)
    assert code == 1
    assert "1 broken" in said or "2 broken" in said


def test_a_new_package_must_be_given_its_place(copy):
    (copy / "dist_train" / "elsewhere").mkdir()
    (copy / "dist_train" / "elsewhere" / "__init__.py").touch()
    assert lint(copy)[0] == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dist_train/losses/distributions.py", "from dist_train.losses.terms import TERMS"),
        ("dist_train/losses/head.py", "from dist_train.losses import divergence"),
        ("dist_train/losses/output.py", "from dist_train.losses import linear"),
    ],
)
def test_a_circle_is_found(copy, module, line):
    with (copy / module).open("a") as file:
        file.write(f"\n{line}\n")
    assert module.removesuffix(".py").replace("/", ".") in circle(copy)


if __name__ == "__main__":
    print(*find_circle())
