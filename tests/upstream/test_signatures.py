"""Whoever calls upstream's public names, as its signatures allow, can call ours."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from tests.upstream.signatures import ABSENT, SIGNATURES, WORKER_EXTENSION

pytestmark = pytest.mark.pure

EXTENSION = Path(__file__).parents[2] / "packages/vllm-plugin/src/checkpoint_engine_vllm/extension.py"
PAGE = Path(__file__).parents[2] / "docs/upstream.md"


def find(name: str) -> object:
    module, *rest = name.split(".")
    found: object = importlib.import_module(f"checkpoint_engine.{module}")
    for part in rest:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", SIGNATURES)
def test_ours_takes_the_same_arguments(name: str) -> None:
    signature = inspect.signature(find(name))  # type: ignore[arg-type]
    positional, _, keywords = SIGNATURES[name].partition("*")
    arguments = [parameter for parameter in signature.parameters if parameter != "self"]
    assert arguments[: len(positional.split())] == positional.split()
    asked = positional.split() + keywords.split()
    for parameter in signature.parameters.values():
        if parameter.name in asked:
            assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        elif parameter.name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            assert parameter.default is not parameter.empty, f"{parameter.name} must be given"
    assert set(asked) <= set(signature.parameters)


def test_the_worker_extension_takes_the_same_arguments() -> None:
    """Read, not imported: vLLM's plugin needs vLLM."""
    classes = [n for n in ast.parse(EXTENSION.read_text()).body if isinstance(n, ast.ClassDef)]
    methods = {
        m.name: m for c in classes if c.name == "WorkerExtension" for m in c.body if isinstance(m, ast.FunctionDef)
    }
    for name, arguments in WORKER_EXTENSION.items():
        assert [argument.arg for argument in methods[name].args.args[1:]] == arguments.split()


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_absent_is_said_to_be(name: str) -> None:
    with pytest.raises((AttributeError, ImportError)):
        find(name)
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    (row,) = (row for row in rows if f"`{name.partition('.')[2]}`" in row or f"`{name}`" in row)
    assert row.split("|")[2].strip() == "absent"
