"""How long a checkpoint in shards takes to be checked and planned: 140,000 tensors on 64 ranks, by default.

Prints seconds of processor time for the check of all boxes, for the plan, and for a plan that is kept. Without data.
"""

from __future__ import annotations

import argparse
import time

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, ShardPlace, TensorEntry
from checkpoint_engine.planning.buckets import align_up
from checkpoint_engine.transfer.announcement import PlanCache

WHOLE = (2048, 7168)


def catalog_of(tensors: int, ranks: int, parts: int) -> Catalog:
    """Every tensor cut by rows into so many parts, on ranks in turn; every hundredth is a norm that two ranks hold."""
    held: list[list[TensorEntry]] = [[] for _ in range(ranks)]
    ends = [0] * ranks

    def put(rank: int, entry: TensorEntry) -> None:
        held[rank].append(entry.moved(ends[rank]))
        ends[rank] = align_up(ends[rank] + entry.nbytes)

    rows = WHOLE[0] // parts
    for number in range(tensors):
        name = f"model.layers.{number // 1200}.mlp.experts.{number % 1200}.weight"
        if number % 100 == 0:
            for part in range(2):
                put((number + part) % ranks, TensorEntry(name, "bfloat16", (7168,), 0))
            continue
        for part in range(parts):
            place = None if parts == 1 else ShardPlace(WHOLE, (part * rows, 0))
            put((number + part) % ranks, TensorEntry(name, "float8_e4m3fn", (rows, WHOLE[1]), 0, place))
    holdings = (Holding(r, "host", f"GPU-{r}", (SegmentEntry(ends[r], tuple(held[r])),)) for r in range(ranks))
    return Catalog("benchmark", tuple(holdings))


def main() -> None:
    """Prints one line for each way to cut."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=140_000)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    for parts in options.parts:
        catalog, plans = catalog_of(options.tensors, options.ranks, parts), PlanCache()
        seconds: list[float] = []
        for step in (catalog.validate, lambda: plans.plan(catalog, 8 << 30), lambda: plans.plan(catalog, 8 << 30)):  # noqa: B023
            start = time.process_time()
            step()
            seconds.append(time.process_time() - start)
        entries = sum(1 for _ in catalog.tensors())
        print(
            f"{options.tensors} tensors, {entries} boxes on {options.ranks} ranks: "
            f"checked in {seconds[0]:.2f} s, planned in {seconds[1]:.2f} s, again in {seconds[2]:.4f} s"
        )


if __name__ == "__main__":
    main()
