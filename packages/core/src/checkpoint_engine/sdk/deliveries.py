"""Tensors that came by a way of an engine's own, made into what a sink takes.

Sinks work out once what to copy out of a bucket that comes again; whoever keeps a `BucketLayout` from one update to the
next spares them that.
"""

from __future__ import annotations

from checkpoint_engine.contract.delivery import Delivery
from checkpoint_engine.dtypes import torch_dtype
from checkpoint_engine.link.messages import TensorSlice
from checkpoint_engine.receiver.deliveries import view_bucket
from checkpoint_engine.receiver.layouts import ReceivedBucket as BucketLayout

__all__ = ["BucketLayout", "Delivery", "TensorSlice", "torch_dtype", "view_bucket"]
