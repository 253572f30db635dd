"""The ranks of the parameter server among themselves."""

from checkpoint_engine.collective import torch_group as torch_group  # registers gloo and nccl
from checkpoint_engine.collective.base import Communicator, open_communicator, register_communicator
from checkpoint_engine.collective.board import Board
from checkpoint_engine.collective.group import Failure, RankGroup, failure_key
from checkpoint_engine.collective.rendezvous import open_store

__all__ = [
    "Board",
    "Communicator",
    "Failure",
    "RankGroup",
    "failure_key",
    "open_communicator",
    "open_store",
    "register_communicator",
]
