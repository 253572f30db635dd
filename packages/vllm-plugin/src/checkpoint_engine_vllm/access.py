"""Who may use our routes in `vllm serve`: holders of vLLM's key, of a token of ours, or, without either, this host."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import cast

from checkpoint_engine.sdk.access import TOKEN_VARIABLE, Access, RefusedError

__all__ = ["TOKEN_VARIABLE", "Access", "RefusedError", "closed", "of_vllm"]


def of_vllm(args: Namespace) -> Access:
    """By what `vllm serve` was started with."""
    given: object = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY", "")]
    keys = [given] if isinstance(given, str) else cast("Sequence[str]", given)
    return _access([key for key in keys if key], os.environ.get(TOKEN_VARIABLE) or None)


def closed() -> Access:
    """Before it is known: this host alone."""
    return _access([], None)


def _access(keys: Sequence[str], token: str | None) -> Access:
    return Access(keys, token, engine="vllm serve", option="--api-key")
