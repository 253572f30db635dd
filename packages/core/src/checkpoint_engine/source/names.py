"""Which tensors of a checkpoint are sent, and under which names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from checkpoint_engine.errors import SettingError

__all__ = ["DRAFT", "WRAPPERS", "NameRules", "common_wrapper"]

_COMPILED = "_orig_mod."
WRAPPERS = ("module.", _COMPILED, "base_model.model.")
"""What torch's data parallelism, its compiler and PEFT put before the names of what they wrap."""

DRAFT = "draft_model."
"""Engines give what is named so to their draft model alone, without this prefix."""


@dataclass(frozen=True)
class NameRules:
    """What is left out, and what is cut off."""

    ignore: tuple[str, ...] = ()
    """Patterns, as of a shell, of names (as they are sent) that are not."""
    strip: tuple[str, ...] = ()
    """Prefixes that are cut off, each once; the compiler's wherever it stands, since it wraps layers too."""
    only: tuple[str, ...] = ()
    """Patterns of names (as they are sent): no others are sent. All are if there is none."""

    def apply(self, names: Iterable[str]) -> dict[str, str]:
        """Name -> the one to send it under, of all that are sent.

        Raises:
            SettingError: nothing is left, a pattern of `only` fits nothing, or two would be sent under one name.
        """
        found = {name: self._stripped(name) for name in names}
        for pattern in self.only if found else ():
            if not any(fnmatchcase(new, pattern) for new in found.values()):
                raise SettingError(f"--only {pattern!r} fits no tensor of the checkpoint")
        sent = {name: new for name, new in found.items() if self._is_sent(new)}
        if found and not sent:
            raise SettingError(f"--ignore {' '.join(self.ignore)} leaves no tensor to send")
        first: dict[str, str] = {}
        for name, new in sent.items():
            if new in first:
                raise SettingError(f"{first[new]!r} and {name!r} would both be sent as {new!r}: strip fewer prefixes")
            first[new] = name
        return sent

    def unused(self, names: Sequence[str]) -> list[str]:
        """Rules by which nothing has changed: mistyped, perhaps."""
        patterns = [each for each in self.ignore if not any(fnmatchcase(self._stripped(name), each) for name in names)]
        prefixes = [each for each in self.strip if not any(each in name for name in names)]
        return patterns + prefixes

    def _is_sent(self, name: str) -> bool:
        if any(fnmatchcase(name, each) for each in self.ignore):
            return False
        return not self.only or any(fnmatchcase(name, each) for each in self.only)

    def _stripped(self, name: str) -> str:
        to_draft = DRAFT if name.startswith(DRAFT) else ""
        name = name.removeprefix(to_draft)
        for prefix in self.strip:
            name = name.replace(prefix, "") if prefix == _COMPILED else name.removeprefix(prefix)
        return to_draft + name


def common_wrapper(names: Sequence[str]) -> str:
    """The wrapper's prefix that all names carry; empty if there is none."""
    inner = [name.removeprefix(DRAFT) for name in names]
    return next((each for each in WRAPPERS if inner and all(name.startswith(each) for name in inner)), "")
