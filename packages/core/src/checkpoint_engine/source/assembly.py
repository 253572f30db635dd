"""What is sent of a checkpoint's directory and, where a draft model has one of its own, of that one's beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from checkpoint_engine.errors import SettingError
from checkpoint_engine.source.directory import read_directory
from checkpoint_engine.source.loader import Selection, keep, split_among_ranks
from checkpoint_engine.source.names import DRAFT, NameRules

__all__ = ["Assembly", "assemble"]


@dataclass(frozen=True)
class Assembly:
    """The tensors that were found, those of a draft model under its prefix, and what becomes of their names."""

    selections: Sequence[Selection]
    sent: Mapping[str, str]
    """Name -> the one to send it under, of all that are sent."""
    left_out: Sequence[str]
    """`.safetensors` files that are not."""
    drafts: frozenset[Path]
    """The draft model's files."""

    @property
    def found(self) -> list[str]:
        """Names of all tensors."""
        return [tensor.name for selection in self.selections for tensor in selection.tensors]

    def of_rank(self, rank: int, ranks: int) -> dict[Path, dict[str, str]]:
        """A rank's share: for each file, its tensors' names in it, and what they shall be called."""
        kept = [keep(selection, self.sent) for selection in self.selections]
        return {
            path: {name.removeprefix(DRAFT) if path in self.drafts else name: self.sent[name] for name in names}
            for path, names in split_among_ranks(kept, ranks)[rank].items()
        }


def assemble(directory: Path, draft: Path | None, rules: NameRules) -> Assembly:
    """Reads the headers of a checkpoint's files, and of its draft's.

    Raises:
        CheckpointFormatError: a directory holds no checkpoint, or a broken one.
        UnsupportedTensorError: a tensor cannot be carried.
        SettingError: nothing is left to send, or the draft is the checkpoint itself.
    """
    if draft is not None and draft.resolve() == directory.resolve():
        raise SettingError(
            f"{draft} is the checkpoint itself: a draft model that an engine has started from there takes part without "
            "being named"
        )
    served, own = read_directory(directory), None if draft is None else read_directory(draft)
    drafts = [] if own is None else own.select()
    selections = [*served.select(), *map(_prefixed, drafts)]
    sent = rules.apply(tensor.name for selection in selections for tensor in selection.tensors)
    left_out = [*served.left_out, *([] if own is None else own.left_out)]
    return Assembly(selections, sent, left_out, frozenset(each.file.path for each in drafts))


def _prefixed(selection: Selection) -> Selection:
    renamed = (msgspec.structs.replace(tensor, name=DRAFT + tensor.name) for tensor in selection.tensors)
    return Selection(selection.file, tuple(renamed))
