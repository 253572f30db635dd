"""The ranks of the parameter server among themselves."""

from checkpoint_engine.collective import torch_group as torch_group  # registers gloo and nccl
from checkpoint_engine.collective.base import (
    Communicator,
    check_backend,
    open_communicator,
    register_communicator,
)
from checkpoint_engine.collective.board import Board
from checkpoint_engine.collective.control_plane import ControlPlane
from checkpoint_engine.collective.group import RankGroup, failure_key
from checkpoint_engine.collective.rendezvous import connect_ranks

__all__ = [
    "Board",
    "Communicator",
    "ControlPlane",
    "RankGroup",
    "check_backend",
    "connect_ranks",
    "failure_key",
    "open_communicator",
    "register_communicator",
]
