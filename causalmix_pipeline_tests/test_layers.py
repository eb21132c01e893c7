"""The import rule: definitions and cli -> automation -> assets -> resources -> adapters -> core."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "causalmix_pipeline"
LAYERS = ["core", "adapters", "resources", "assets", "automation", "top"]
FREE_OF_DAGSTER = ("core", "adapters")
CORE_LIBRARIES = {"numpy", "polars", "scipy"}


def layer_of(module: str) -> str:
    part = module.split(".")[1] if module.count(".") else ""
    return part if part in LAYERS else "top"


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Each imported module, and whether the import is at module level."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [(name, node in tree.body) for name in names]
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_only_its_own_layer_and_those_below(path):
    own = LAYERS.index(layer_of(module_name(path)))

    above = [
        name
        for name, _ in imports_of(path)
        if name.startswith("causalmix_pipeline.") and LAYERS.index(layer_of(name)) > own
    ]

    assert above == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_core_and_adapters_know_nothing_of_dagster(path):
    if layer_of(module_name(path)) in FREE_OF_DAGSTER:
        assert not [name for name, _ in imports_of(path) if name.split(".")[0] == "dagster"]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_core_needs_numpy_polars_and_scipy_alone_and_scipy_only_inside_functions(path):
    import sys

    if layer_of(module_name(path)) != "core":
        return
    outside = [
        (name.split(".")[0], top)
        for name, top in imports_of(path)
        if name.split(".")[0] not in {*sys.stdlib_module_names, "causalmix_pipeline"}
    ]

    assert {name for name, _ in outside} <= CORE_LIBRARIES
    assert ("scipy", True) not in outside


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_module_with_dagster_objects_postpones_its_annotations(path):
    """`from __future__ import annotations` breaks `context:` and `config:` in Dagster 1.13."""
    if layer_of(module_name(path)) not in FREE_OF_DAGSTER:
        assert "__future__" not in [name for name, _ in imports_of(path)] or path.stem == "cli"


def test_only_resources_read_the_environment():
    readers = [
        module_name(path)
        for path in MODULES
        if any(
            isinstance(node, ast.Attribute)
            and node.attr in ("environ", "getenv")
            and isinstance(node.ctx, ast.Load)
            for node in ast.walk(ast.parse(path.read_text()))
        )
        and not _only_sets(path)
    ]

    assert [name for name in readers if layer_of(name) != "resources"] == []


def _only_sets(path: Path) -> bool:
    """Whether a module touches os.environ only to set variables of its own workers."""
    tree = ast.parse(path.read_text())
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "environ"]
    sets = [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)
    ]
    return all(use in sets for use in uses)
