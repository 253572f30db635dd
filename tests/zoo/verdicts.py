"""What an update makes of a family, in a word and a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["OUTCOMES", "Verdict", "judge"]

OUTCOMES = ("by plan", "partly by plan", "by loader", "refused", "silently wrong", "wrongly compared", "not built")
_LONGEST = 160


@dataclass(frozen=True)
class Verdict:
    """Of one family."""

    outcome: str
    """One of `OUTCOMES`."""
    why: str = ""


def judge(cold: Mapping[str, Any], update: Mapping[str, Any]) -> Verdict:
    """Takes what the two processes found."""
    for found in (cold, update):
        if "failed" in found:
            return Verdict("not built", _short(found["failed"]))
    steps = update["steps"]
    wrong = [step for step in steps if step["differing"]]
    if wrong:
        return Verdict(
            "silently wrong", _short(f"to {wrong[0]['to']} ({wrong[0]['reload']}): {wrong[0]['differing'][0]}")
        )
    failed = [step for step in steps if "error" in step]
    if failed:
        late = "" if all(step["intact"] for step in failed) else "after layers had changed: "
        return Verdict("refused", late + _short(failed[0]["error"]))
    return _compared(update["verify"]) or _taken([step for step in steps if step["mode"] == "auto"][-1])


def _compared(verify: Mapping[str, Any]) -> Verdict | None:
    equal, other = verify["equal"], verify["other"]
    problems = {
        "cannot be compared": equal.get("error") or other.get("error"),
        "is told to differ from itself": equal.get("different"),
        "is not compared whole": equal.get("not_compared") if equal.get("unseen_tensors") else "",
        "another byte in the model is not seen": ", ".join(verify["overlooked"]),
        "a difference is not seen": ", ".join(verify["blind"]),
        "fails with one element changed": ", ".join(verify["failed"]),
        "a comparison changes": ", ".join(verify["changed_by_it"]),
        "another checkpoint is told to be the same": "" if other.get("different_tensors") else "(nothing differs)",
    }
    found = next(((words, what) for words, what in problems.items() if what), None)
    return None if found is None else Verdict("wrongly compared", _short(f"{found[0]}: {found[1]}"))


def _taken(step: Mapping[str, Any]) -> Verdict:
    planned, loaded = step["plan_bytes"], step["loader_bytes"]
    if not planned:
        return Verdict("by loader", _short(step["loader_reason"]))
    if not loaded:
        return Verdict("by plan")
    return Verdict("partly by plan", f"{planned / (planned + loaded):.1%} of bytes; {_short(step['loader_reason'])}")


def _short(words: str) -> str:
    plain = " ".join(words.split()).replace("|", "/")
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]} …"
