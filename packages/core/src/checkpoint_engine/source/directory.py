"""Which tensors of a directory are the checkpoint: what engines' own loaders take, and no file beside it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from checkpoint_engine.errors import CheckpointFormatError
from checkpoint_engine.source.loader import Selection
from checkpoint_engine.source.safetensors_file import read_header

__all__ = ["CheckpointDirectory", "find_files", "read_directory", "select_directory"]

_INDEX = "model.safetensors.index.json"
_MODULES = "modules.json"
_CONSOLIDATED = "consolidated"
_BESIDE = re.compile(r"(adapter_model|optimizer|scheduler|scaler|rng_state|random_states|training_args)")
"""How files begin that trainers write beside a model."""
_SHARD = re.compile(r"(?P<stem>.*?)-?(?P<number>\d+)-of-(?P<count>\d+)")
_PICKLED = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class CheckpointDirectory:
    """The files of a checkpoint, sorted, and what else there is."""

    files: list[Path]
    home_of: Mapping[str, str]
    """Which file's tensor of that name counts, as far as an index says so."""
    left_out: list[str]
    """`.safetensors` files that are not sent, as they lie in the directory."""

    def select(self) -> list[Selection]:
        """Reads the headers. Of tensors that several files hold, those are picked that the index names.

        Raises:
            CheckpointFormatError: a file is broken, or lacks what the index says of it.
            UnsupportedTensorError: a tensor cannot be carried.
        """
        headers = [read_header(path) for path in self.files]
        holders: dict[str, list[str]] = defaultdict(list)
        for file in headers:
            for tensor in file.tensors:
                holders[tensor.name].append(file.path.name)
        missing = [f"{name} of {home}" for name, home in self.home_of.items() if name not in holders]
        if missing:
            raise CheckpointFormatError(
                f"{self.files[0].parent / _INDEX} names tensors that are in no file: {_few(sorted(missing))}; copy the "
                "files again, or remove the index if it is not theirs"
            )

        def counts(name: str, file: str) -> bool:
            home = self.home_of.get(name)
            return home is None or home == file or home not in holders[name]

        return [Selection(f, tuple(t for t in f.tensors if counts(t.name, f.path.name))) for f in headers]


def find_files(directory: Path) -> list[Path]:
    """The `.safetensors` files of a checkpoint directory; see `read_directory`."""
    return read_directory(directory).files


def select_directory(directory: Path) -> list[Selection]:
    """The tensors of a checkpoint directory; see `read_directory` and `CheckpointDirectory.select`."""
    return read_directory(directory).select()


def read_directory(directory: Path) -> CheckpointDirectory:
    """The files of a checkpoint directory: those of its index, or else all that engines' loaders would take.

    Without an index, hidden files are left out, what trainers write beside a model (adapters, optimizers), and a
    `consolidated` file beside others, which holds the same once more.

    Raises:
        CheckpointFormatError: there are none, one is missing, or the index is broken.
    """
    if not directory.is_dir():
        raise CheckpointFormatError(f"{directory} is not a directory")
    found = sorted(directory.glob("*.safetensors"))
    index = directory / _INDEX
    if index.exists():
        home_of = _read_index(index)
        files = sorted({index.parent / name for name in home_of.values()})
        missing = [str(path) for path in files if not path.is_file()]
        if missing:
            raise CheckpointFormatError(f"{index} names files that are missing: {_few(missing)}; copy them again")
    else:
        home_of, files = {}, _of_a_model(found)
        _refuse_gaps(files)
    if not files:
        raise CheckpointFormatError(f"{directory} holds no .safetensors file{_other_format(directory, found)}")
    left_out = [path.name for path in sorted(set(found) - set(files))]
    return CheckpointDirectory(files, home_of, left_out + _of_other_modules(directory))


def _of_a_model(found: Sequence[Path]) -> list[Path]:
    files = [path for path in found if not path.name.startswith(".") and not _BESIDE.match(path.name)]
    once_more = [path for path in files if path.name.startswith(_CONSOLIDATED)]
    return files if len(once_more) == len(files) else [path for path in files if path not in once_more]


def _of_other_modules(directory: Path) -> list[str]:
    """Files of the modules that Sentence-Transformers puts behind a model, such as `2_Dense/model.safetensors`.

    Engines read them at a start, under names that clash with the model's.
    """
    try:
        modules: Any = json.loads((directory / _MODULES).read_bytes())
        paths = [str(module["path"]) for module in modules]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return []
    folders = [path for path in paths if path and Path(path).name == path]
    return [
        f"{folder}/{path.name}" for folder in folders for path in sorted((directory / folder).glob("*.safetensors"))
    ]


def _refuse_gaps(files: Sequence[Path]) -> None:
    """Raises if files are numbered, "1 of 3", and one is missing."""
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for path in files:
        if named := _SHARD.fullmatch(path.stem):
            numbers[named["stem"], named["count"]].add(int(named["number"]))
    for (stem, count), there in numbers.items():
        first = 0 if 0 in there else 1
        missing = sorted(set(range(first, first + int(count))) - there)
        if missing:
            raise CheckpointFormatError(
                f"of {count} files {stem}… in {files[0].parent} these are missing: {_few(list(map(str, missing)))}; "
                "copy them again"
            )


def _read_index(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_bytes())
        home_of = dict(cast("dict[str, object]", content["weight_map"]))
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointFormatError(f"{index} is not an index of a checkpoint: {error!r}") from error
    if not home_of:
        raise CheckpointFormatError(f"{index} names no file")
    for name in home_of.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointFormatError(f"{index} names {name!r}, which is no .safetensors file beside it")
    return cast("dict[str, str]", home_of)


def _other_format(directory: Path, found: Sequence[Path]) -> str:
    """What there is instead."""
    if found:
        return f" of a model, only {_few([path.name for path in found])}"
    if any(directory.glob("*.distcp")):
        return (
            ", but the shards of torch's distributed checkpoint; have torch.distributed.checkpoint put them together "
            "(format_utils.dcp_to_torch_save, then save as safetensors)"
        )
    pickled = [path.name for pattern in _PICKLED for path in sorted(directory.glob(pattern))]
    return f", but {_few(pickled)}, which are pickles; save it as safetensors" if pickled else ""


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
