"""The rules of the house, checked: import directions, file sizes, start-up, no unsafe loading."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "polytask"

# Folders in dependency order; a folder imports from levels at or above its own, never below.
LEVELS = [
    {"errors", "registry", "rng", "files", "configs"},
    {"data"},
    {"tasks"},
    {"mixture", "models", "objectives"},
    {"train"},
    {"adapt", "merge", "compress", "continual", "align"},
    {"infer", "evaluate"},
    {"study"},
    {"report"},
    {"pipeline"},
    {"systems"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
STAGES = LEVELS[5]


def module_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of polytask that a file imports, type-checking imports included."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("polytask."):
            parts.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            parts |= {a.name.split(".")[1] for a in node.names if a.name.startswith("polytask.")}
    return parts


@pytest.mark.parametrize("path", module_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_down_the_dependency_order(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the package's own lazy exports reach everywhere
    for part in imported_parts(path) - {own}:
        assert LEVEL[part] <= LEVEL[own], f"{own} must not import {part}"
        assert not (own in STAGES and part in STAGES), f"stage {own} must not import stage {part}"


@pytest.mark.parametrize("path", module_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_holds_one_idea(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("path", module_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "joblib", "dill"} & set(names)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert safe.get("weights_only") == "True"


LIGHT = ["polytask", "polytask.cli", "polytask.data", "polytask.tasks", "polytask.mixture"]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'pandas', 'transformers', "
    code += "'matplotlib', 'datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
