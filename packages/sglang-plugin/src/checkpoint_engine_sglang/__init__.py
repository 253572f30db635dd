"""The SGLang plugin: new weights reach a serving SGLang in place.

In SGLang's environment: `plugin.register`, which SGLang calls. In that of the parameter server, which needs no SGLang:
`SGLangClient`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoint_engine_sglang.client import SGLangClient

__version__ = "0.1.0"
__all__ = ["SGLangClient", "__version__"]


def __getattr__(name: str) -> object:
    # SGLang imports this package in each of its processes, which need no client.
    if name == "SGLangClient":
        from checkpoint_engine_sglang.client import SGLangClient  # noqa: PLC0415

        return SGLangClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
