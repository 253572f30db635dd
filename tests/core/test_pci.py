"""GPUs get the network cards beside them. `Host` stands in for a machine: files as its kernel and driver show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint_engine.host.network_cards import Card, find_cards
from checkpoint_engine.host.pci import distance, gpu_addresses, pair_cards, path_of, path_of_card

pytestmark = pytest.mark.pure


class Host:
    """The stand-in: a tree of PCI devices below `sys`, and the driver's list of GPUs."""

    def __init__(self, root: Path) -> None:
        self.sys, self.driver = root / "sys", root / "gpus"
        (self.sys / "bus/pci/devices").mkdir(parents=True)
        (self.sys / "class/infiniband").mkdir(parents=True)
        self.driver.mkdir()

    def add(self, place: str, node: int) -> Path:
        """A device, such as `pci0000:00/0000:00:01.0/0000:01:00.0`."""
        device = self.sys / "devices" / place
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
        (self.sys / "bus/pci/devices" / device.name).symlink_to(device)
        return device

    def add_gpu(self, place: str, node: int) -> None:
        (self.driver / self.add(place, node).name).mkdir()

    def add_card(self, name: str, place: str, node: int, gigabits: int) -> None:
        device = self.add(place, node)
        own = device / "infiniband" / name
        port = own / "ports" / "1"
        port.mkdir(parents=True)
        (own / "device").symlink_to(device)
        (device / "vendor").write_text("0x15b3\n")
        (port / "state").write_text("4: ACTIVE\n")
        (port / "rate").write_text(f"{gigabits} Gb/sec (4X NDR)\n")
        (self.sys / "class/infiniband" / name).symlink_to(own)

    def pairs(self) -> list[list[str]]:
        cards = find_cards(self.sys / "class/infiniband")
        paths = {card: path_of_card(card, self.sys) for card in cards}
        gpus = [path_of(address, self.sys) for address in gpu_addresses(self.driver)]
        return [[card.device for card in pair_cards(cards, paths, gpus, gpu)] for gpu in range(len(gpus))]


def test_ten_active_cards_two_of_them_slow_front_ends(tmp_path: Path) -> None:
    """The slow ones are numbered in the middle: dealt out in order, GPU 4 would have them, others their neighbour's."""
    host = Host(tmp_path)
    numbers = [0, 1, 2, 3, 6, 7, 8, 9]
    for gpu, number in enumerate(numbers):
        switch = f"pci0000:{gpu:x}0/0000:{gpu:x}0:01.0/0000:{gpu:x}1:00.0"
        host.add_gpu(f"{switch}/0000:{gpu:x}2:00.0/0000:{gpu:x}3:00.0", gpu // 4)
        host.add_card(f"mlx5_{number}", f"{switch}/0000:{gpu:x}2:01.0/0000:{gpu:x}4:00.0", gpu // 4, 400)
    for number in (4, 5):
        host.add_card(f"mlx5_{number}", f"pci0000:f{number}/0000:f{number}:00.0", 1, 100)
    assert host.pairs() == [[f"mlx5_{number}"] for number in numbers]


def test_gpus_below_one_switch_share_its_cards(tmp_path: Path) -> None:
    host = Host(tmp_path)
    for switch in range(2):
        for slot in range(2):
            below = f"pci0000:{switch}0/0000:{switch}0:01.0"
            host.add_gpu(f"{below}/0000:{switch}2:0{slot}.0", 0)
            # Numbered the other way round: it is the place that counts.
            host.add_card(f"mlx5_{3 - 2 * switch - slot}", f"{below}/0000:{switch}3:0{slot}.0", 0, 200)
    assert host.pairs() == [["mlx5_2"], ["mlx5_3"], ["mlx5_0"], ["mlx5_1"]]


def test_a_card_of_the_same_memory_node_is_nearer_than_one_of_another(tmp_path: Path) -> None:
    host = Host(tmp_path)
    for node in range(2):
        host.add_gpu(f"pci0000:{node}0/0000:{node}0:01.0", node)
        host.add_card(f"mlx5_{1 - node}", f"pci0000:{node}8/0000:{node}8:01.0", node, 200)
    assert host.pairs() == [["mlx5_1"], ["mlx5_0"]]


def test_where_nothing_is_known_all_fast_cards_are_dealt_out() -> None:
    cards = [Card(f"mlx5_{number}", 1, True, rate) for number, rate in enumerate((50e9, 12e9, 50e9))]
    assert [pair_cards(cards, {}, [(), ()], gpu) for gpu in range(2)] == [[cards[0]], [cards[2]]]
    assert pair_cards([], {}, [("node 0", "pci0")], 0) == []
    unknown = [Card("mlx5_0", 1, True, 0.0), Card("mlx5_1", 1, True, 0.0)]
    assert [pair_cards(unknown, {}, [(), ()], gpu) for gpu in range(2)] == [[unknown[0]], [unknown[1]]]


def test_what_the_host_does_not_say_is_no_path(tmp_path: Path) -> None:
    assert path_of("0000:1b:00.0", tmp_path) == ()
    assert gpu_addresses(tmp_path / "nothing") == []
    assert distance(("node 0", "pci0", "a"), ("node 0", "pci0", "b", "c")) == 3
