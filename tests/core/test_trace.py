"""What a traced update says: every bucket in every stage, on one clock, in order; and the file that holds it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint_engine.cli import timeline_plot
from checkpoint_engine.cli.timeline_data import load_timeline
from checkpoint_engine.device import CpuDevice
from checkpoint_engine.errors import MissingDependencyError, SettingError
from checkpoint_engine.transfer.trace import DeviceClock, RankTrace, Span, chrome_trace, save_trace
from tests.core.cluster import Cluster, check

LOAD_SECONDS = 0.02


@pytest.fixture
def pair(set_bucket_size: Callable[[int], None], clusters: Callable[[int], Cluster]) -> Cluster:
    set_bucket_size(64 << 10)
    return clusters(2)


def traced_update(pair: Cluster) -> list[RankTrace]:
    pair.register("a", {f"t{i}": torch.full((100, 100), float(i)) for i in range(12)})
    for recorder in pair.recorders:
        recorder.on_load = lambda: time.sleep(LOAD_SECONDS)
    check(pair.on_all(lambda server: server.update("a", pair.asker(server.rank), trace=True)))
    gathered = pair.on_all(lambda server: server.gather_traces())
    check(gathered)
    assert gathered[0] == gathered[1]
    return gathered[0]


def test_every_bucket_passes_every_stage_in_order_and_on_one_clock(pair: Cluster) -> None:
    began = time.perf_counter()
    traces = traced_update(pair)
    ended = time.perf_counter()
    assert [trace.rank for trace in traces] == [0, 1]
    report = pair.servers[0].last_report
    assert report is not None
    buckets = range(report.buckets)
    copied: dict[int, Span] = {}
    for trace in traces:
        assert all(began <= span.begin <= span.end <= ended for span in trace.spans)
        lanes = {lane: {s.bucket: s for s in trace.spans if s.lane == lane} for lane in ("copy", "broadcast", "load")}
        assert sorted(lanes["broadcast"]) == sorted(lanes["load"]) == list(buckets)
        assert not copied.keys() & lanes["copy"].keys()
        copied |= lanes["copy"]
        for bucket in buckets:
            assert lanes["broadcast"][bucket].end <= lanes["load"][bucket].begin
            assert lanes["load"][bucket].end - lanes["load"][bucket].begin >= LOAD_SECONDS
        met = next(span.end for span in trace.spans if span.name == "wait for the worker")
        assert min(span.begin for span in lanes["copy"].values()) < met, "staging is filled while the engine serves"
        phases = {span.name for span in trace.spans if span.lane == "phases"}
        assert {"introduce", "connect", "staging", "worker checks", "finish", "free"} <= phases
        assert max(span.end for span in trace.spans) - began >= 0.99 * report.seconds["total"]
    assert sorted(copied) == list(buckets)
    for trace in traces:
        for span in trace.spans:
            if span.lane == "broadcast":
                assert span.end >= copied[span.bucket].end
    assert sum(span.nbytes for span in copied.values()) >= report.nbytes


def test_the_worker_loads_while_the_next_bucket_is_broadcast(pair: Cluster) -> None:
    trace = traced_update(pair)[0]
    ends = {span.bucket: span.end for span in trace.spans if span.lane == "load"}
    begins = {span.bucket: span.begin for span in trace.spans if span.lane == "broadcast"}
    assert any(begins[bucket + 1] < ends[bucket] for bucket in ends if bucket + 1 in begins)


def test_nothing_is_traced_unless_asked_for(pair: Cluster) -> None:
    traced_update(pair)
    check(pair.update("a"))
    assert all(server.last_report is not None and server.last_report.trace is None for server in pair.servers)
    assert pair.on_all(lambda server: server.gather_traces()) == [[], []]


def test_a_direct_update_has_nothing_but_loads(pair: Cluster, tmp_path: Path) -> None:
    traced_update(pair)
    check(pair.on_all(lambda server: server.update("a", pair.asker(server.rank), trace=True, method="direct")))
    reports = [server.last_report for server in pair.servers]
    traces = [report.trace for report in reports if report is not None and report.trace is not None]
    assert len(traces) == 2
    for trace in traces:
        assert {span.lane for span in trace.spans} == {"phases", "load"}
        assert len([span for span in trace.spans if span.lane == "load"]) == reports[0].buckets  # pyright: ignore[reportOptionalMemberAccess]
    save_trace(tmp_path / "trace.json", traces)
    assert load_timeline(tmp_path / "trace.json").limit(None) is None


def test_a_worker_with_another_clock_is_placed_by_ours(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpoint_engine.receiver import reception as receiver

    loaded = receiver.Loaded
    monkeypatch.setattr(receiver, "Loaded", lambda bucket, seconds, began: loaded(bucket, seconds, began + 1e6))
    before = time.perf_counter()
    spans = [span for trace in traced_update(pair) for span in trace.spans if span.lane == "load"]
    assert all(before < span.begin < time.perf_counter() for span in spans)


def test_device_times_are_host_times() -> None:
    stream = CpuDevice(0).stream()
    clock = DeviceClock(stream)
    before = time.perf_counter()
    event = stream.record()
    assert before - 0.01 <= clock.at(event) <= time.perf_counter() + 0.01


def hand_made(host: str = "h", boot: str = "b", wall: float = 0.0, rank: int = 0) -> RankTrace:
    spans = (
        Span("phases", "connect", 100.0, 101.0),
        Span("phases", "staging", 100.5, 100.9),
        Span("copy", "bucket 0", 101.0, 102.0, 0, 2_000_000_000),
        Span("broadcast", "bucket 0", 102.0 + rank, 104.0, 0, 2_000_000_000),
        Span("load", "bucket 0", 104.0, 104.5, 0, 2_000_000_000),
    )
    return RankTrace(rank, f"cpu:{rank}", host, boot, wall, spans)


@pytest.mark.pure
def test_the_file_is_what_chrome_and_perfetto_read() -> None:
    content = chrome_trace([hand_made(rank=1), hand_made()], version="v")
    events = content["traceEvents"]
    assert content["otherData"] == {"version": "v", "clock": "monotonic clock of one host"}
    assert {event["ph"] for event in events} == {"M", "X"}
    copy = next(event for event in events if event["cat" if event["ph"] == "X" else "ph"] == "copy")
    assert (copy["pid"], copy["ts"], copy["dur"]) == (0, 1e6, 1e6)
    assert copy["args"] == {"bucket": 0, "bytes": 2_000_000_000, "GB/s": 2.0}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert all(threads[e["pid"], e["tid"]] == e["cat"] for e in events if e["ph"] == "X")


@pytest.mark.pure
def test_other_hosts_are_brought_into_line_by_their_wall_clocks() -> None:
    far = hand_made("other", "another boot", wall=1000.0, rank=1)
    far = replace(far, spans=tuple(replace(s, begin=s.begin - 1000, end=s.end - 1000) for s in far.spans))
    content = chrome_trace([hand_made(wall=0.25), far])
    begins = {e["pid"]: e["ts"] for e in content["traceEvents"] if e.get("cat") == "copy"}
    assert begins[0] - begins[1] == pytest.approx(0.25e6)
    assert "several hosts" in content["otherData"]["clock"]


@pytest.mark.pure
def test_timeline_measures_what_the_trace_holds(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    save_trace(file, [hand_made(), hand_made(rank=1)], version="v")
    loaded = load_timeline(file)
    assert loaded.seconds == pytest.approx(4.5)
    lanes = {(lane.rank, lane.stage): lane for lane in loaded.lanes}
    assert list(lanes) == [(rank, stage) for rank in (0, 1) for stage in ("phases", "copy", "broadcast", "load")]
    # Rank 0 was ready for the broadcast a second before rank 1.
    assert lanes[0, "broadcast"].bars[0].ready == pytest.approx(lanes[0, "broadcast"].bars[0].begin + 1)
    assert lanes[0, "broadcast"].busy == lanes[1, "broadcast"].busy == pytest.approx(1.0)
    assert [bar.depth for bar in lanes[0, "phases"].bars] == [0, 1]
    measured, given = loaded.limit(None), loaded.limit(4e9)
    assert measured is not None
    assert given is not None
    assert (measured.seconds, given.seconds) == (pytest.approx(1.0), pytest.approx(0.5))


@pytest.mark.pure
@pytest.mark.parametrize("content", ["", "[]", '{"traceEvents": []}', '{"traceEvents": [{"ph": 1}]}'])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "trace.json"
    file.write_text(content)
    with pytest.raises(SettingError, match=r"update --trace"):
        load_timeline(file)


def test_timeline_draws(tmp_path: Path, run_main: Callable[..., tuple[int, str, str]]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "trace.json"
    save_trace(file, [hand_made(), hand_made(rank=1)], version="v", method="broadcast", bytes=4_000_000_000)
    code, said, error = run_main("timeline", file, "-o", tmp_path / "picture.png", "--rate", 4, "--json")
    assert code == 0, error
    result = json.loads(said)
    assert result["share_of_limit"] == pytest.approx(0.5 / 4.5)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert run_main("timeline", file, "-o", tmp_path / "picture.svg")[0] == 0
    picture = (tmp_path / "picture.svg").read_text()
    assert "</svg>" in picture
    for output, cause in (("picture.gif", ".png"), ("missing/picture.png", "directory")):
        code, _, said = run_main("timeline", file, "-o", tmp_path / output)
        assert code == 1
        assert cause in " ".join(said.split())


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    save_trace(file, [hand_made()])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"checkpoint-engine-core\[plot\]"):
        timeline_plot.draw(load_timeline(file), None, tmp_path / "picture.png")


def test_where_nothing_can_be_written_is_said_before_the_update(
    run_main: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    arguments = ("update", tmp_path, "--engine", "reference", "--endpoint", "unix:/nowhere.sock")
    code, _, said = run_main(*arguments, "--trace", tmp_path / "missing" / "trace.json")
    assert code == 1
    assert "cannot write" in said
