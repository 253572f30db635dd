from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import SettingError
from checkpoint_engine.host.network_cards import Card, cards_for_gpu, find_cards, find_gpus, gpu_of_host, select_cards

pytestmark = pytest.mark.pure

MLX = [Card(f"mlx5_{i}", 1, True, 50e9) for i in range(12)]
TWO_PORTS = [Card("mlx5_0", 1, True, 50e9), Card("mlx5_0", 2, True, 50e9), Card("bnxt_re0", 1, True, 12.5e9)]


def names(cards: list[Card]) -> list[str]:
    return [f"{card.device}:{card.port}" for card in cards]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mlx5", ["mlx5_0:1"]),
        ("mlx5_0:2", ["mlx5_0:2"]),
        ("=mlx5_0:2,bnxt_re0", ["mlx5_0:2", "bnxt_re0:1"]),
        ("bnxt,mlx5", ["bnxt_re0:1", "mlx5_0:1"]),
        ("^mlx5", ["bnxt_re0:1"]),
        ("^=mlx5", ["mlx5_0:1", "bnxt_re0:1"]),
        ("^=mlx5_0", ["bnxt_re0:1"]),
        ("^=mlx5_0:1", ["mlx5_0:2", "bnxt_re0:1"]),
        ("^mlx5,bnxt", []),
        (" mlx5_0 , bnxt_re0:1 ", ["mlx5_0:1", "bnxt_re0:1"]),
        ("", ["mlx5_0:1", "bnxt_re0:1"]),
    ],
)
def test_nccls_syntax(text: str, expected: list[str]) -> None:
    assert names(select_cards(TWO_PORTS, nccl_hca=text)) == expected


def test_a_prefix_is_not_a_whole_name() -> None:
    assert names(select_cards(MLX, nccl_hca="mlx5_1")) == ["mlx5_1:1", "mlx5_10:1", "mlx5_11:1"]
    assert names(select_cards(MLX, nccl_hca="=mlx5_1")) == ["mlx5_1:1"]
    assert len(select_cards(MLX, nccl_hca="^mlx5_1")) == 9
    assert len(select_cards(MLX, nccl_hca="^=mlx5_1")) == 11


@pytest.mark.parametrize("text", ["mlx5_0:x", "mlx5_0:", ":1"])
def test_what_names_no_device_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="NCCL_IB_HCA"):
        select_cards(MLX, nccl_hca=text)


@pytest.mark.parametrize("text", ["mlx4", "=mlx5", "=mlx5_0:7"])
def test_what_matches_no_device_leaves_all_as_nccl_does(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert select_cards(MLX, nccl_hca=text) == select_cards(MLX)
    assert "matches no RDMA device" in caplog.text


def test_our_own_variable_wins_and_keeps_its_order() -> None:
    assert names(select_cards(MLX, "mlx5_3, mlx5_1", "^mlx5")) == ["mlx5_3:1", "mlx5_1:1"]
    with pytest.raises(SettingError, match=r"'mlx5_99'.*mlx5_0, mlx5_1"):
        select_cards(MLX, "mlx5_99")


def test_ports_that_are_down_are_left_out_unless_named() -> None:
    cards = [Card("mlx5_0", 1, False, 0.0), Card("mlx5_0", 2, True, 50e9), Card("mlx5_1", 1, False, 0.0)]
    assert names(select_cards(cards)) == ["mlx5_0:2"]
    assert names(select_cards(cards, "mlx5_0,mlx5_1")) == ["mlx5_0:2", "mlx5_1:1"]
    assert names(select_cards(cards, nccl_hca="mlx5")) == ["mlx5_0:2"]


@given(st.integers(1, 40), st.integers(1, 16))
def test_cards_spread_over_gpus(count: int, gpus: int) -> None:
    cards = [Card(f"c{i}", 1, True, 1.0) for i in range(count)]
    each = [cards_for_gpu(cards, gpu, gpus) for gpu in range(gpus)]
    used = [card for share in each for card in share]
    assert set(used) == set(cards)
    assert all(each)
    if count >= gpus:
        assert len(used) == count
        assert max(map(len, each)) - min(map(len, each)) <= 1
    else:
        shared = [used.count(card) for card in cards]
        assert max(shared) - min(shared) <= 1


def test_cards_that_do_not_exist_serve_nobody() -> None:
    assert cards_for_gpu([], 0, 8) == []
    with pytest.raises(SettingError):
        cards_for_gpu(MLX, 8, 8)


GPUS = [f"GPU-{letter}{letter}-1234" for letter in "abcdefgh"]


@pytest.mark.parametrize(
    ("local", "visible", "gpus", "seen", "expected"),
    [
        (0, None, GPUS, 8, (0, 8)),
        (1, "4,6", GPUS, 2, (6, 8)),
        (1, "4,6", [], 2, (6, 7)),
        (1, "GPU-aa-1234,GPU-CC", GPUS, 2, (2, 8)),
        (0, "GPU-hh", GPUS, 1, (7, 8)),
        (0, "GPU-", GPUS, 1, (0, 1)),
        (1, "GPU-aa,GPU-bb", [], 2, (1, 2)),
        (0, "MIG-0", GPUS, 1, (0, 1)),
        (0, "", [], 0, (0, 1)),
        (3, "0,1", [], 0, (3, 4)),
    ],
)
def test_the_gpu_of_the_host(
    local: int, visible: str | None, gpus: list[str], seen: int, expected: tuple[int, int]
) -> None:
    assert gpu_of_host(local, visible, gpus, seen) == expected


def test_gpus_are_read_from_the_drivers_files(tmp_path: Path) -> None:
    assert find_gpus(tmp_path / "nothing") == []
    for bus, uuid in (("0000:4b:00.0", "GPU-bb-1"), ("0000:0f:00.0", "GPU-aa-1"), ("0000:99:00.0", "")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t NVIDIA\nGPU UUID: \t {uuid}\nDevice Minor: \t 2\n")
    assert find_gpus(tmp_path) == ["GPU-aa-1", "GPU-bb-1"]


def test_cards_are_read_from_the_kernels_files(tmp_path: Path) -> None:
    assert find_cards(tmp_path / "nothing") == []
    for name, vendor, state, rate in (
        ("mlx5_10", "0x15b3", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("mlx5_2", "0x15b3", "1: DOWN", "unreadable"),
        ("rdmap0", "0x1d0f", "4: ACTIVE", "100 Gb/sec"),
    ):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (tmp_path / name / "device").mkdir()
        (tmp_path / name / "device" / "vendor").write_text(vendor)
        (port / "state").write_text(state)
        (port / "rate").write_text(rate)
    assert find_cards(tmp_path) == [
        Card("mlx5_2", 1, False, 0.0),
        Card("mlx5_10", 1, True, 50e9),
        Card("rdmap0", 1, True, 12.5e9, efa=True),
    ]
