"""The rules of the house, drawn from one list of rooms: imports run downward, names stand in one place."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from growth_megatron.growth.operators import markdown_table, registry
from growth_megatron.model import architecture

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "growth_megatron"
ROOMS = (
    "errors", "config", "parallel", "model", "data", "checkpoint", "growth", "train", "evaluate", "report", "commands",
    "__main__",
)  # fmt: skip
"""From the bottom to the top: a room imports from itself and from those before it."""

CHECKPOINT_ROOMS = ("folder", "torch_dist", "huggingface", "origin")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.stat().st_size)


def imports(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and parts below ``growth_megatron`` of each import from it, also of those made when a function runs."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("growth_megatron."):
                yield node.lineno, name.split(".")[1:]  # type: ignore[attr-defined]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each string that is no docstring."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    here = ROOMS.index(room_of(path)) if room_of(path) in ROOMS else len(ROOMS)
    for line, parts in imports(path):
        if parts[0] in ROOMS:
            assert ROOMS.index(parts[0]) <= here, f"{path}:{line} imports {'.'.join(parts)} from a higher room"


def test_every_room_is_in_the_list() -> None:
    found = {room_of(path) for path in MODULES}
    assert found - {"__init__", "_version"} <= set(ROOMS)


def test_there_are_no_circles() -> None:
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in MODULES}
    below: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for _, parts in imports(path):
            for length in range(len(parts), 0, -1):
                target = ".".join(parts[:length])
                if target in names and target != name:
                    below[name].add(target)
                    break
    state: dict[str, int] = {}

    def visit(name: str, chain: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"modules import each other: {' -> '.join((*chain, name))}"
        if name not in state:
            state[name] = 1
            for target in sorted(below[name]):
                visit(target, (*chain, name))
            state[name] = 2

    for name in names:
        visit(name, ())


def compared_strings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each string that the code compares with, by an operator or ``match``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            parts: list[ast.AST] = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        else:
            continue
        for part in parts:
            for inner in ast.walk(part):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield node.lineno, inner.value  # type: ignore[attr-defined]


def test_no_name_of_an_operator_is_compared_outside_the_operators() -> None:
    for path in MODULES:
        if (PACKAGE / "growth" / "operators") in path.parents:
            continue
        for line, text in compared_strings(path):
            assert text not in registry(), f"{path}:{line} compares with the operator {text}"


def test_no_tensor_is_named_outside_the_table() -> None:
    rows = (*architecture.BEFORE_LAYERS, *architecture.IN_LAYER, *architecture.AFTER_LAYERS)
    words = {part for row in rows for name in (row.name, *row.huggingface) for part in name.split(".")}
    words -= {"weight", "bias", "mlp", "decoder", "model", "embedding", "norm", "self_attention", "self_attn"}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(words)))})\b")
    for path in MODULES:
        if path == PACKAGE / "model" / "architecture.py":
            continue
        for line, text in strings(path):
            assert not pattern.search(text), f"{path}:{line} names a tensor: {text!r}"


def test_the_page_of_operators_has_the_table_of_the_registry() -> None:
    assert markdown_table() in (ROOT / "docs" / "operators.md").read_text()


def test_what_shell_scripts_and_documents_import_exists() -> None:
    texts = "\n".join(path.read_text() for where in ("launch/*.sh", "*.md", "docs/*.md") for path in ROOT.glob(where))
    found = re.findall(r"from (growth_megatron[\w.]*) import (\w+)", texts)
    assert ("growth_megatron.growth.configuration", "load_config") in found
    for module, name in found:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
