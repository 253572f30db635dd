"""What tells the reference engine apart."""

from checkpoint_engine.client.announced import EngineSign

__all__ = ["SIGN"]

SIGN = EngineSign("/pids", "pids")
