"""Draws the charts of the documentation out of landed results and the simulation.

    python benchmarks/pictures.py                # docs/step.svg and docs/scaling.svg; the second takes minutes
    python benchmarks/pictures.py --only step

Needs matplotlib (`pip install 'checkpoint-engine-core[plot]'`).
"""

# matplotlib leaves its keyword arguments untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from simulate import RESULTS, check, step_of
from simulation.machines import Machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).parents[1] / "docs"
WARM = 3
"""Steps of a run that are left out: in its first ones plans are recorded and proved."""
STEPS = (
    # what it is, run, system in it
    ("upstream 0.4.2", "rl-step-moe15b-20261129-221230", "upstream"),
    ("ours, in three calls", "rl-step-moe15b-20261129-030836", "host-direct"),
    ("ours, one call", "rl-step-moe15b-20261129-221230", "host"),
    ("ours, device memory", "rl-step-moe15b-20261129-221230", "device"),
    ("vLLM's own ipc", "rl-step-vllm-moe30b-20261129-222304", "ipc"),
    ("ours, vLLM", "rl-step-vllm-moe30b-20261130-104831", "device"),
    ("SGLang's own", "rl-step-sglang-moe30b-20261130-102724", "tensors"),
    ("ours, SGLang", "rl-step-sglang-moe30b-20261130-102724", "device"),
)
NAMED = 0.5
"""Seconds of a stage from which its name fits into its bar."""
GROUPS = ((4, "31.2 GB into a stand-in engine"), (4, "61.1 GB into a real engine"))
SCALED, PARALLEL = "kimi-k2", 16
HOSTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
COLOURS = {"register": "#e08a1e", "gather": "#7b5ea7", "update": "#2f6db3", "send": "#2f6db3"}
OTHER, INK, FAINT = "#9aa4b2", "#22272e", "#6b7480"
WAYS = {"broadcast": "#e08a1e", "direct": "#2f6db3"}


def seconds_of(run: str, system: str) -> dict[str, float]:
    """Medians of each stage of a step, and of the whole."""
    steps = json.loads((RESULTS / f"{run}.json").read_text())["steps"][system][WARM:]
    return {stage: statistics.median(step["seconds"][stage] for step in steps) for stage in steps[0]["seconds"]}


def draw_step() -> Figure:
    """A step of each system, its stages one after the other."""
    figure = Figure(figsize=(9.6, 4.6), facecolor="white")
    first = 0
    for panel, (count, title) in enumerate(GROUPS):
        axes = figure.add_axes((0.2, 0.56 - panel * 0.47, 0.74, 0.34))
        plain(axes)
        axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        for row, (label, run, system) in enumerate(STEPS[first : first + count]):
            draw_bar(axes, row, label, seconds_of(run, system))
        axes.set_yticks(range(count), [label for label, _, _ in STEPS[first : first + count]])
        axes.invert_yaxis()
        axes.set_xlim(0, 7.4 if panel else 3.6)
        axes.set_xlabel("seconds" if panel else "", color=FAINT)
        first += count
    return figure


def draw_bar(axes: Axes, row: int, label: str, seconds: dict[str, float]) -> None:
    """One system's."""
    whole, left = seconds["whole"], 0.0
    for stage, taken in seconds.items():
        if stage == "whole":
            continue
        axes.barh(row, taken, left=left, height=0.62, color=COLOURS.get(stage, OTHER))
        if taken > NAMED:
            axes.text(left + taken / 2, row, stage, ha="center", va="center", fontsize=8, color="white")
        left += taken
    said = f"{whole:.2g} s" if whole < 1 else f"{whole:.2f} s"
    weight = "bold" if label.startswith("ours") else "normal"
    axes.annotate(said, (whole, row), (5, 0), textcoords="offset points", va="center", color=INK, fontweight=weight)


def draw_scaling() -> Figure:
    """What was measured beside its simulation, and a simulation of what was not."""
    figure = Figure(figsize=(9.6, 3.9), facecolor="white")
    left, right = figure.add_axes((0.08, 0.16, 0.3, 0.68)), figure.add_axes((0.48, 0.16, 0.48, 0.68))
    draw_measured(left)
    draw_simulated(right)
    return figure


def draw_measured(axes: Axes) -> None:
    """Landed runs: a dot each."""
    plain(axes)
    axes.set_title("measured and simulated, 1 and 2 GPUs", loc="left", fontsize=10, color=INK, fontweight="bold")
    runs = check()
    for method, colour in WAYS.items():
        those = [run for run in runs if run["method"] == method]
        axes.scatter(
            [run["measured"] for run in those], [run["simulated"] for run in those], color=colour, label=method
        )
    most = 1.05 * max(max(run["measured"], run["simulated"]) for run in runs)
    axes.plot((0, most), (0, most), color=FAINT, linewidth=1, linestyle="dashed", label="equal")
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="measured, seconds", ylabel="simulated, seconds")
    axes.legend(frameon=False, fontsize=8)


def draw_simulated(axes: Axes) -> None:
    """Seconds of an update by the number of GPUs, and what the busiest wire needs."""
    plain(axes)
    axes.set_title("Kimi-K2, 1,029 GB, TP 16: simulated", loc="left", fontsize=10, color=INK, fontweight="bold")
    gpus = [hosts * Machine.gpus for hosts in HOSTS]
    for method, colour in WAYS.items():
        steps = [step_of(SCALED, Machine(hosts), method, PARALLEL) for hosts in HOSTS]
        axes.plot(gpus, [step.seconds for step in steps], color=colour, marker="o", label=method)
        axes.plot(gpus, [step.bound for step in steps], color=colour, linestyle="dotted", label=f"{method}, bound")
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [f"{number:,}" for number in gpus])
    axes.set(ylim=(0, None), xlabel="GPUs", ylabel="seconds")
    axes.legend(frameon=False, fontsize=8)


def plain(axes: Axes) -> None:
    """No frame that carries nothing."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(FAINT)
    axes.yaxis.label.set_color(FAINT)


def main() -> None:
    """Writes what is asked for."""
    pictures = {"step": draw_step, "scaling": draw_scaling}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=pictures, nargs="+", default=[*pictures], help="default: both")
    parser.add_argument("--into", type=Path, default=DOCS)
    options = parser.parse_args()
    mpl.rcParams |= {"svg.hashsalt": "checkpoint-engine", "svg.fonttype": "none", "font.family": "sans-serif"}
    for name in options.only:
        pictures[name]().savefig(options.into / f"{name}.svg", metadata={"Date": None})
        print(f"wrote {options.into / name}.svg")


if __name__ == "__main__":
    main()
