"""Cuts what comes at once into parts, so that only few layers have to be open at a time.

A layer whose weights an engine keeps in another layout gets memory laid out as in the checkpoint while it is filled. In
a direct update everything comes at once: opened together, all layers would take as much again as the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from weakref import WeakKeyDictionary

from checkpoint_engine.contract.delivery import Delivery, Pairs

__all__ = ["AT_ONCE", "Parting"]

AT_ONCE = 1 << 30
"""Bytes of layers that are open at a time; one layer is open however large it is."""


class Parting:
    """Knows how much memory layers take while they are open. One object serves any number of updates."""

    def __init__(self, layers_of: Mapping[str, Collection[str]], nbytes: Mapping[str, int]) -> None:
        """Makes it.

        Args:
            layers_of: Tensor -> the layers to be opened that it is for.
            nbytes: Layer -> bytes that it takes while it is open.
        """
        self._layers_of = layers_of
        self._nbytes = nbytes
        self._known: WeakKeyDictionary[Delivery, tuple[Delivery, ...]] = WeakKeyDictionary()
        """Empty for what stays whole."""

    def of(self, tensors: Pairs) -> Sequence[Pairs]:
        """The tensors of one layer after the other, some layers together; those that no layer waits for come first.

        What comes again is cut the same way: the parts are the same objects then.
        """
        if not isinstance(tensors, Delivery) or tensors.nbytes <= AT_ONCE:
            return (tensors,)
        parts = self._known.get(tensors)
        if parts is None:
            groups = self._cut(tensors.names)
            self._known[tensors] = parts = tuple(map(tensors.part, groups)) if len(groups) > 1 else ()
        return parts or (tensors,)

    def _cut(self, names: Sequence[str]) -> list[list[int]]:
        of_layer: dict[str, list[int]] = {}
        groups: list[list[int]] = [[]]
        for number, name in enumerate(names):
            layer = min(self._layers_of.get(name, ()), default=None)
            (groups[0] if layer is None else of_layer.setdefault(layer, [])).append(number)
        opened = 0
        for layer, numbers in of_layer.items():
            if opened and opened + self._nbytes[layer] > AT_ONCE:
                groups.append([])
                opened = 0
            opened += self._nbytes[layer]
            groups[-1] += numbers
        return groups
