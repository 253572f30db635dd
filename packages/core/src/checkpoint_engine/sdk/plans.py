"""Reload by plan, for an engine plugin: an engine's loader is watched once, and its copies are replayed.

`Reloader` does all of it for a worker whose parameters lie where its loader puts them. The other names are its parts,
for engines whose kernels keep weights in layouts of their own.
"""

from __future__ import annotations

from checkpoint_engine.contract.delivery import names_of, nbytes_of
from checkpoint_engine.contract.sink import Tensors
from checkpoint_engine.reload.kept_proofs import KeptProofs
from checkpoint_engine.reload.ladder import Ladder, PlannedLayers, PlanStage, Rung
from checkpoint_engine.reload.loading import give_to_loader, rejection
from checkpoint_engine.reload.overheads import without_functions
from checkpoint_engine.reload.parting import Parting
from checkpoint_engine.reload.plan import Recording, ReloadPlan, make_plan
from checkpoint_engine.reload.proof import Checksums, Proof
from checkpoint_engine.reload.reach import HeldTensors, Reached, reach
from checkpoint_engine.reload.recorder import LoaderError, record
from checkpoint_engine.reload.reloader import Reloader
from checkpoint_engine.reload.replay import Replay
from checkpoint_engine.reload.switches import changed_switches, switches_of

__all__ = [
    "Checksums",
    "HeldTensors",
    "KeptProofs",
    "Ladder",
    "LoaderError",
    "Parting",
    "PlanStage",
    "PlannedLayers",
    "Proof",
    "Reached",
    "Recording",
    "ReloadPlan",
    "Reloader",
    "Replay",
    "Rung",
    "Tensors",
    "changed_switches",
    "give_to_loader",
    "make_plan",
    "names_of",
    "nbytes_of",
    "reach",
    "record",
    "rejection",
    "switches_of",
    "without_functions",
]
