"""The house rules that a reader of imports and sizes can check."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dp_peft_diffusion"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

# A room may import itself and rooms of later rows, never its own row or an earlier one.
LAYERS = (
    ("cli",),
    ("evaluation",),
    ("replay",),
    ("training", "pretraining"),
    ("attempt", "plan"),
    ("preparation",),
    ("resolution",),
    ("rehearsal",),
    ("batches",),
    ("sharing",),
    ("diffusion",),
    ("runs",),
    ("gradients",),
    ("privacy",),
    ("recipe", "environment"),
    ("strict_yaml", "typed_fields", "durable"),
    ("errors",),
)
ROW = {room: row for row, rooms in enumerate(LAYERS) for room in rooms}
TORCH_FREE = ("privacy", "recipe", "strict_yaml", "typed_fields", "errors")
BRINGS_TORCH = {"accelerate", "cleanfid", "datasets", "diffusers", "opacus", "peft", "safetensors", "torch"}
BRINGS_TORCH |= {"torchvision", "transformers"}
DISTRIBUTION = {"PIL": "pillow", "cleanfid": "clean-fid", "dp_accounting": "dp-accounting", "sklearn": "scikit-learn"}
DISTRIBUTION |= {"yaml": "pyyaml"}


def sources(package: Path) -> Iterator[tuple[tuple[str, ...], ast.Module]]:
    """(dotted name below the package without __init__, parsed source) of every module but the facade."""
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).with_suffix("").parts
        if name != ("__init__",):
            yield name, ast.parse(path.read_text())


def imported_modules(name: tuple[str, ...], tree: ast.Module) -> Iterator[str]:
    """Every module or member that the source imports, at any depth, as an absolute dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = (PACKAGE.name, *name)[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer_faults(package: Path) -> list[str]:
    faults = []
    for name, tree in sources(package):
        here = name[0]
        if here not in ROW:
            faults.append(f"{here} stands in no layer")
            continue
        for imported in imported_modules(name, tree):
            top, *rest = imported.split(".")
            if top != PACKAGE.name:
                continue
            there = rest[0] if rest else "the facade"
            if there not in ROW:
                faults.append(f"{here} imports {imported}, which stands in no layer")
            elif there != here and ROW[there] <= ROW[here]:
                faults.append(f"{'.'.join(name)} imports {imported}")
    return faults


def torch_faults(package: Path) -> list[str]:
    return [
        f"{'.'.join(name)} imports {imported}"
        for name, tree in sources(package)
        if name[0] in TORCH_FREE
        for imported in imported_modules(name, tree)
        if imported.split(".")[0] in BRINGS_TORCH
    ]


def size_faults(package: Path) -> list[str]:
    faults = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        if text.count("\n") > MAX_FILE_LINES:
            faults.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and code_lines(node) > MAX_FUNCTION_LINES:
                faults.append(f"{path.name}: {node.name} has {code_lines(node)} lines without its docstring")
    return faults


def code_lines(function: ast.FunctionDef) -> int:
    docstring = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)


def undeclared_imports(package: Path) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {line.split(">=")[0].lower() for line in project["dependencies"]}
    imported = {module.split(".")[0] for name, tree in sources(package) for module in imported_modules(name, tree)}
    foreign = imported - set(sys.stdlib_module_names) - {PACKAGE.name}
    return {DISTRIBUTION.get(module, module) for module in foreign} - declared


def test_every_room_imports_only_later_layers():
    assert layer_faults(PACKAGE) == []


def test_privacy_and_recipe_import_no_torch():
    assert torch_faults(PACKAGE) == []


def test_importing_the_promise_leaves_torch_out():
    modules = [".".join((PACKAGE.name, *name)) for name, _ in sources(PACKAGE) if name[0] in TORCH_FREE]
    code = f"import sys, {PACKAGE.name}, {', '.join(modules)}; sys.exit('torch' in sys.modules)".replace(
        ".__init__", ""
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_and_functions_fit_their_budget():
    assert size_faults(PACKAGE) == []


def test_every_imported_package_is_a_declared_dependency():
    assert undeclared_imports(PACKAGE) == set()


def test_every_python_package_is_shipped():
    shipped = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = [path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")]
    assert shipped == {".".join(folder.parts) for folder in folders} | {f"{PACKAGE.name}.recipes"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("gradients/clipper.py", "import dp_peft_diffusion.diffusion.adapters"),
        ("gradients/clipper.py", "def f():\n    from dp_peft_diffusion.training import run"),
        ("privacy/ledger.py", "from ..cli import main"),
        ("privacy/ledger.py", "from .. import cli"),
        ("training.py", "from dp_peft_diffusion import pretraining"),
        ("sharing/export.py", "from dp_peft_diffusion import train"),
        ("attic.py", "import json"),
    ],
)
def test_an_import_of_an_earlier_layer_is_found(tmp_path, file, source):
    plant(tmp_path, file, source)
    assert len(layer_faults(tmp_path)) == 1


@pytest.mark.parametrize("source", ["import torch", "from torch import nn", "def f():\n    import torch.nn as nn"])
def test_torch_in_the_promise_is_found(tmp_path, source):
    plant(tmp_path, "privacy/ledger.py", source)
    assert len(torch_faults(tmp_path)) == 1


def test_a_long_file_and_a_long_function_are_found(tmp_path):
    plant(tmp_path, "recipe.py", "x = 1\n" * 351)
    plant(tmp_path, "errors.py", "def f():\n    '''\n" + "\n" * 100 + "    '''\n" + "    x = 1\n" * 60)
    assert len(size_faults(tmp_path)) == 2


def test_a_package_that_is_not_declared_is_found(tmp_path):
    plant(tmp_path, "recipe.py", "import json, yaml, leftpad\nfrom sklearn import svm")
    assert undeclared_imports(tmp_path) == {"leftpad"}


def plant(package: Path, file: str, source: str) -> None:
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).write_text(source)
