"""Public names: every one resolves, and plugins use no other name of the core."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SDK = (
    "checkpoint_engine.sdk",
    *(f"checkpoint_engine.sdk.{part}" for part in ("client", "deliveries", "plans", "replicas", "testing")),
)

WITHOUT_PLUGIN = """
import sys
sys.modules["checkpoint_engine_vllm"] = None
import inspect, pydoc
import checkpoint_engine, checkpoint_engine.worker
assert not hasattr(checkpoint_engine, "VllmColocateWorkerExtension")
for module in (checkpoint_engine, checkpoint_engine.worker):
    assert inspect.getmembers(module)
    assert "update_weights_from_ipc" in pydoc.render_doc(module)
try:
    checkpoint_engine.VllmColocateWorkerExtension
except AttributeError as error:
    assert "pip install checkpoint-engine-vllm" in str(error), error
from checkpoint_engine import *
from checkpoint_engine.worker import *
assert ParameterServer and update_weights_from_ipc
"""
NOT_ANNOUNCED = """
import importlib.metadata
importlib.metadata.entry_points = lambda **_: ()
"""


@pytest.mark.parametrize("hidden", ["", NOT_ANNOUNCED], ids=["module", "distribution"])
def test_the_package_can_be_looked_at_without_the_vllm_plugin(hidden: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", hidden + WITHOUT_PLUGIN], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_plugin_serves_the_old_name() -> None:
    from checkpoint_engine import VllmColocateWorkerExtension, worker
    from checkpoint_engine_vllm import WorkerExtension

    assert VllmColocateWorkerExtension is WorkerExtension is worker.VllmColocateWorkerExtension


SOURCES = [
    path
    for folder in ("core", "vllm-plugin", "sglang-plugin")
    for path in (ROOT / f"packages/{folder}/src").rglob("*.py")
]
NOT_INSTALLED = {"verl", "ray", "vllm", "sglang", "fastapi", "uvicorn", "matplotlib", "mooncake", "cuda"}


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[parts.index("src") + 1 :]).removesuffix(".__init__")


def names_at_the_top(tree: ast.Module) -> set[str]:
    """What a module makes itself: functions, classes and values; type variables aside."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and "TypeVar(" not in ast.unparse(node):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_what_a_module_makes_is_public_or_private_by_name(path: Path) -> None:
    tree = ast.parse(path.read_text())
    made = names_at_the_top(tree)
    public = {name for name in made if not name.startswith("_")} - {"logger"}
    if not public or path.name == "__main__.py":
        return
    declared = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert declared, f"{path} has no __all__ for {sorted(public)}"
    assert public <= set(ast.literal_eval(declared[0]))


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_every_public_name_resolves(path: Path) -> None:
    if path.name == "__main__.py":
        return
    try:
        module = importlib.import_module(module_of(path))
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in NOT_INSTALLED:
            raise
        pytest.skip(f"{error.name} is not installed")
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), f"{module.__name__}.{name}"


@pytest.mark.parametrize("name", SDK)
def test_every_name_of_the_sdk_resolves(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None, public
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = module.nothing_of_the_kind


def test_the_sdk_brings_no_torch_until_that_is_needed() -> None:
    code = "import sys, checkpoint_engine.sdk.client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_types_of_the_sdk_are_where_they_are_at_home() -> None:
    """What a type checker reads is what runs."""
    tree = ast.parse((ROOT / "packages/core/src/checkpoint_engine/sdk/__init__.py").read_text())
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("checkpoint_engine")
        for alias in node.names
    }
    sdk = importlib.import_module("checkpoint_engine.sdk")
    assert set(typed) == set(sdk.__all__)
    for name, home in typed.items():
        assert getattr(importlib.import_module(str(home)), name) is getattr(sdk, name), name


def test_class_names_are_unique() -> None:
    """One meaning a noun; `P2PStore` of `checkpoint_engine.p2p_store` is upstream's, by its name."""
    homes: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "packages").glob("*/src/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and path.name != "p2p_store.py":
                homes.setdefault(node.name, []).append(path.relative_to(ROOT))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}
