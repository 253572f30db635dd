"""Asking an engine, for the client of a plugin: it runs beside the parameter server, and brings no torch."""

from __future__ import annotations

from checkpoint_engine.background import in_background
from checkpoint_engine.client.announced import EngineSign, InstalledEngine
from checkpoint_engine.client.delegate import ClientDelegate
from checkpoint_engine.client.endpoint import Endpoint, NoEndpoint, Reply, shorten
from checkpoint_engine.client.engine_client import PauseMode
from checkpoint_engine.client.rpc_client import CollectiveRpcClient
from checkpoint_engine.client.workers_client import WorkersClient, WorkersOrder
from checkpoint_engine.contract.failure import Failure, describe_failures
from checkpoint_engine.contract.phase import Phase
from checkpoint_engine.contract.reports import WorkerReport, WorkerStatus, name_of_update
from checkpoint_engine.deadline import Deadline

__all__ = [
    "ClientDelegate",
    "CollectiveRpcClient",
    "Deadline",
    "Endpoint",
    "EngineSign",
    "Failure",
    "InstalledEngine",
    "NoEndpoint",
    "PauseMode",
    "Phase",
    "Reply",
    "WorkerReport",
    "WorkerStatus",
    "WorkersClient",
    "WorkersOrder",
    "describe_failures",
    "in_background",
    "name_of_update",
    "shorten",
]
