"""Collectives between the ranks of the parameter server, under the names that update scripts use.

    import checkpoint_engine.distributed as dist

    ps.init_process_group()
    dist.barrier()

The group is our own: torch's default process group is not needed, and not touched but by `export_default_group`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from typing import Any, cast

import msgspec
import torch
import torch.distributed as torch_dist

from checkpoint_engine.collective import Communicator, ControlPlane, connect_ranks, open_communicator
from checkpoint_engine.collective.base import registered_backends
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.device import accelerators, type_of
from checkpoint_engine.errors import CheckpointStateError, SettingError

__all__ = [
    "DistributedProcessGroup",
    "adopt",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "destroy_process_group",
    "export_default_group",
    "init_process_group",
    "is_initialized",
    "new_group",
    "take_back_default_group",
    "use_backend",
]

logger = logging.getLogger(__name__)

_TEN_MINUTES = timedelta(minutes=10)
_KNOWN_AS = {"vllm_nccl": "nccl"}
"""What upstream calls a communicator in a group of its own, which leaves the caller's alone: here each is one."""
_PLAIN = (type(None), bool, int, float, str, bytes)


class DistributedProcessGroup:
    """Some of the ranks. A communicator is opened when the first tensor of its kind of device is sent.

    Attributes:
        ranks: Their ranks in the whole group, ascending.
        rank: Place of this process among them.
    """

    def __init__(
        self,
        plane: ControlPlane,
        name: str,
        ranks: Sequence[int],
        timeout: timedelta,
        backend: str | None = None,
        *,
        closes: bool = False,
    ) -> None:
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(plane.rank)
        self._plane = plane
        self._name = name
        self._closes = closes
        self._timeout = timeout
        self._backend = backend
        self._board = plane.board(self.ranks)
        self._numbers = count(1)
        self._communicators: dict[str, Communicator] = {}

    def exchange(self, mine: bytes, waiting_for: str) -> list[bytes]:
        """What every rank brought, in order of rank.

        Raises:
            DeadlineError: a rank did not come in time; the message says which.
        """
        key = f"{self._name}/exchange-{next(self._numbers)}"
        return self._board.gather(key, mine, Deadline(self._timeout.total_seconds()), Cancel(), waiting_for)

    def communicator(self, device: torch.device) -> Communicator | None:
        """The communicator for tensors on that device; None for a single rank, which needs none."""
        if len(self.ranks) == 1:
            return None
        backend = self._backend or type_of(device).backend
        if backend not in self._communicators:
            store = torch_dist.PrefixStore(f"{self._name}/communicator-{backend}", self._plane.store)
            self._communicators[backend] = open_communicator(
                backend, store, self.rank, len(self.ranks), self._timeout, device
            )
        return self._communicators[backend]

    def subgroup(self, ranks: Sequence[int], timeout: timedelta | None) -> DistributedProcessGroup | None:
        """A group of some of these ranks, which all of them make together; None for those left out."""
        name = f"{self._name}/group-{next(self._numbers)}"
        members = sorted(set(ranks))
        strangers = set(members).difference(self.ranks)
        if strangers or not members:
            raise SettingError(f"a group of ranks {members} cannot be made out of ranks {list(self.ranks)}")
        me = self.ranks[self.rank]
        if me not in members:
            return None
        return DistributedProcessGroup(self._plane, name, members, timeout or self._timeout, self._backend)

    def place_of(self, rank: int) -> int:
        """Where a rank of the whole group stands in this one.

        Raises:
            SettingError: it does not belong to it.
        """
        if rank not in self.ranks:
            raise SettingError(f"rank {rank} is not one of {list(self.ranks)}")
        return self.ranks.index(rank)

    def close(self) -> None:
        """Closes the communicators, and what connects the ranks if it is of this group alone."""
        for communicator in self._communicators.values():
            communicator.close()
        self._communicators.clear()
        if self._closes:
            self._plane.close()


_default: DistributedProcessGroup | None = None
_chosen_backend: str | None = None


def use_backend(backend: str | None) -> None:
    """Chooses the communicator for groups made from now on; None leaves the choice to the device of each tensor.

    Raises:
        SettingError: no communicator of that name is registered.
    """
    global _chosen_backend  # noqa: PLW0603 - the known names are functions of a module
    backend = _KNOWN_AS.get(backend, backend) if backend is not None else None
    if backend is not None and backend not in registered_backends():
        raise SettingError(
            f"no communicator {backend!r} is registered; there are {', '.join(registered_backends())}. Others are made "
            "known with checkpoint_engine.collective.register_communicator(name, factory)"
        )
    _chosen_backend = backend


def init_process_group(
    rank: int,
    world_size: int,
    store: torch_dist.Store | None = None,
    *,
    timeout: timedelta = _TEN_MINUTES,
    master_addr: str | None = None,
    master_port: int | None = None,
    backend: str | None = None,
) -> None:
    """Connects the ranks; `ParameterServer.init_process_group` does it for you.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        store: A store that all ranks share; opened at the master's address if None.
        timeout: For every later wait.
        master_addr: Host of rank 0; `MASTER_ADDR` if None.
        master_port: A free port there; `MASTER_PORT` if None.
        backend: Communicator for tensors; if None that of `use_backend`, else the one that fits the tensor.

    Raises:
        CheckpointStateError: there is a group already.
        SettingError: no address is known.
        DeadlineError: not all ranks came in time.
    """
    if _default is not None:
        raise CheckpointStateError("the ranks are connected already; call destroy_process_group first")
    if not 0 <= rank < world_size:
        raise SettingError(f"rank {rank} is not one of {world_size} ranks")
    plane = connect_ranks(rank, world_size, master_addr, master_port, store)
    adopt(plane, timeout, backend, closes=True)
    barrier()


def adopt(
    plane: ControlPlane, timeout: timedelta, backend: str | None = None, *, closes: bool = False
) -> DistributedProcessGroup:
    """Lets the functions of this module work over what connects the ranks already; with `closes` it ends with them."""
    global _default  # noqa: PLW0603 - the known names are functions of a module
    ranks = range(plane.world_size)
    _default = DistributedProcessGroup(plane, "distributed", ranks, timeout, backend or _chosen_backend, closes=closes)
    return _default


def export_default_group(plane: ControlPlane, timeout: timedelta) -> bool:
    """Gives torch its default process group, if torchrun started this process as this rank and there is none.

    It is for barriers and the like, over Gloo. Returns whether there is one now that was not there before.
    """
    if torch_dist.is_initialized() or (os.environ.get("RANK"), os.environ.get("WORLD_SIZE")) != (
        str(plane.rank),
        str(plane.world_size),
    ):
        return False
    try:
        torch_dist.init_process_group(
            "gloo",
            store=torch_dist.PrefixStore("default-group", plane.store),
            rank=plane.rank,
            world_size=plane.world_size,
            timeout=timeout,
        )
    except RuntimeError as error:
        logger.warning("torch gets no default process group from us, Gloo cannot connect the ranks: %s", error)
        return False
    return True


def take_back_default_group() -> None:
    """Ends the group that was lent, unless somebody has ended it already."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether the ranks are connected."""
    return _default is not None


def destroy_process_group(group: DistributedProcessGroup | None = None) -> None:
    """Closes a group, or the whole of them; does nothing if there is none."""
    global _default  # noqa: PLW0603 - the known names are functions of a module
    closing = group or _default
    if closing is not None:
        closing.close()
    if closing is _default:
        _default = None


def new_group(ranks: Sequence[int], *, timeout: timedelta | None = None) -> DistributedProcessGroup | None:
    """A group of some ranks. All ranks call this, in the same order; those left out get None.

    Raises:
        SettingError: there is no such rank.
        CheckpointStateError: the ranks are not connected.
    """
    return _group(None).subgroup(ranks, timeout)


def barrier(group: DistributedProcessGroup | None = None) -> None:
    """Returns once all ranks have called this; work queued on this process's GPU is done by then.

    Raises:
        DeadlineError: a rank did not come in time; the message says which.
    """
    for device_type in accelerators():
        device_type.synchronize_all()
    _group(group).exchange(b"", "all ranks being at the barrier")


def broadcast(tensor: torch.Tensor, src: int = 0, group: DistributedProcessGroup | None = None) -> None:
    """Fills `tensor` on all ranks with that of rank `src`.

    Raises:
        RankError: a rank is gone, or did not take part in time.
    """
    chosen = _group(group)
    source = chosen.place_of(src)
    communicator = chosen.communicator(tensor.device)
    if communicator is not None:
        communicator.broadcast(tensor, source)


def all_reduce(
    tensor: torch.Tensor,
    op: torch_dist.ReduceOp.RedOpType = torch_dist.ReduceOp.SUM,
    group: DistributedProcessGroup | None = None,
) -> None:
    """Combines `tensor` over all ranks, in place.

    Raises:
        RankError: a rank is gone, or did not take part in time.
    """
    communicator = _group(group).communicator(tensor.device)
    if communicator is not None:
        communicator.all_reduce(tensor, op)


def all_gather_object(object_list: list[object], obj: object, group: DistributedProcessGroup | None = None) -> None:
    """Puts what every rank brought into `object_list`, in order of rank.

    Plain data only: None, bool, int, float, str, bytes, and lists, tuples and dicts of these. Nothing is pickled, so
    nothing that comes from another rank is ever executed.

    Raises:
        SettingError: `obj` holds something else, or `object_list` has another length than the group.
        DeadlineError: a rank did not come in time; the message says which.
    """
    chosen = _group(group)
    if len(object_list) != len(chosen.ranks):
        raise SettingError(f"object_list has {len(object_list)} places for {len(chosen.ranks)} ranks")
    try:
        mine = msgspec.msgpack.encode(_packed(obj))
    except (OverflowError, RecursionError) as error:
        raise SettingError(f"all_gather_object cannot carry this: {error}") from error
    everybody = chosen.exchange(mine, "all ranks gathering objects")
    object_list[:] = [_unpacked(msgspec.msgpack.decode(text)) for text in everybody]


def _group(group: DistributedProcessGroup | None) -> DistributedProcessGroup:
    chosen = group or _default
    if chosen is None:
        raise CheckpointStateError(
            "the ranks are not connected; call ParameterServer.init_process_group (or init_process_group here) first"
        )
    return chosen


def _packed(obj: object) -> object:
    """Containers become pairs with their kind, so that a tuple comes back as a tuple and any key is allowed."""
    kind = type(obj)
    if kind in _PLAIN:
        return obj
    if kind in (list, tuple):
        return [kind.__name__, [_packed(item) for item in cast("Sequence[object]", obj)]]
    if kind is dict:
        return ["dict", [[_packed(key), _packed(value)] for key, value in cast("dict[object, object]", obj).items()]]
    raise SettingError(
        f"all_gather_object carries plain data only, not {kind.__module__}.{kind.__qualname__}: turn it into "
        "dicts, lists, text and numbers first"
    )


def _unpacked(packed: Any) -> object:  # noqa: ANN401 - what `_packed` made
    if not isinstance(packed, list):
        return packed
    kind, items = cast("tuple[str, list[Any]]", packed)
    if kind == "dict":
        return {_unpacked(key): _unpacked(value) for key, value in items}
    unpacked = [_unpacked(item) for item in items]
    return tuple(unpacked) if kind == "tuple" else unpacked
