"""A worker extension of somebody else, as frameworks name one for themselves; for `--worker-extension-cls` in tests."""

from __future__ import annotations


class Other:
    """Has a method of its own, and one that upstream's has too."""

    def update_weights_from_ipc(self) -> str:
        return "of the other extension"
