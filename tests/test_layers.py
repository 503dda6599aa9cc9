"""The library's folders are layers: imports point one way, and a config loads without MLX."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dpo_mlx
import pytest

LIBRARY = Path(dpo_mlx.__file__).parent

# From the bottom to the top. A module imports its own layer and those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("files",),
    ("config",),
    ("process",),
    ("data",),
    ("model",),
    ("scoring",),
    ("parallel",),
    ("voice",),
    ("training",),
    ("report", "export"),
    ("stages",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def name_of(path: Path) -> str:
    """A module's name below the library: "files.jsonl"."""
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts)


MODULES = {name_of(path): path for path in LIBRARY.rglob("*.py") if path.name != "__init__.py"}


def imports(name: str) -> Iterator[str]:
    """The modules of the library that a module imports, also those within its functions."""
    here = name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
        target = ".".join(filter(None, base))
        if target in MODULES:
            yield target
        else:
            yield from (".".join(filter(None, (target, alias.name))) for alias in node.names)


GRAPH = {name: {*imports(name)} for name in MODULES}


def test_every_import_is_understood():
    """Absolute imports, or names that are not modules, would escape the tests here."""
    assert {target for targets in GRAPH.values() for target in targets} <= MODULES.keys()
    for path in MODULES.values():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) dpo_mlx", text, re.MULTILINE)


def test_every_module_has_a_layer():
    """A new folder must be given its place."""
    assert {name.split(".")[0] for name in MODULES} == RANK.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    """Nothing imports from a layer above its own."""
    layer = name.split(".")[0]
    above = {target for target in GRAPH[name] if RANK[target.split(".")[0]] > RANK[layer]}
    siblings = {
        target
        for target in GRAPH[name]
        if (folder := target.split(".")[0]) != layer and RANK[folder] == RANK[layer]
    }
    assert not above
    assert not siblings


def test_no_circle():
    """Also within a layer."""
    assert [*graphlib.TopologicalSorter(GRAPH).static_order()]


def test_a_config_loads_without_mlx():
    """Reading a YAML file takes no second, and works where MLX cannot be loaded."""
    code = "import sys, dpo_mlx.config; print([name for name in sys.modules if 'mlx' in name])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=LIBRARY.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    names = ast.literal_eval(result.stdout)
    assert [name for name in names if not name.startswith("dpo_mlx")] == []
