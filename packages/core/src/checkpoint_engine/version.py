"""The version of this distribution."""

from importlib.metadata import version

__all__ = ["DISTRIBUTION", "__version__"]

DISTRIBUTION = "checkpoint-engine-core"
__version__ = version(DISTRIBUTION)
