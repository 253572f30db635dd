"""`checkpoint-engine inspect`: what it says is what registering and gathering would give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.cli.contents import catalog_of_files, read_contents
from checkpoint_engine.cli.inspect import parse_size
from checkpoint_engine.cli.main import app
from checkpoint_engine.data_types import metas_to_json
from checkpoint_engine.errors import CheckpointFormatError, DuplicateTensorError, SettingError
from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.source.directory import find_files, select_directory
from tests.commands import run_command

TENSORS = {
    "a.safetensors": {f"layer.{i}.w": torch.randn(40, 33).bfloat16() for i in range(20)}
    | {"scalar": torch.tensor(2.0)},
    "b.safetensors": {
        "embed": torch.randn(500, 64),
        "empty": torch.zeros(0, 5),
        "mask": torch.ones(7, dtype=torch.bool),
    },
}
EVERY = {name: tensor for file in TENSORS.values() for name, tensor in file.items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "step-7"
    directory.mkdir()
    for file, tensors in TENSORS.items():
        save_file(tensors, directory / file)
    return directory


def inspect(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def gathered(checkpoint: Path) -> tuple[ParameterServer, Catalog]:
    server = ParameterServer(rank=0, world_size=1, device="cpu")
    server.register_checkpoint("step-7", files=find_files(checkpoint), use_inplace_pin_memory=False)
    server.gather_metas("step-7")
    return server, server.catalog("step-7")


def test_what_a_directory_holds(checkpoint: Path) -> None:
    said = inspect(checkpoint, "--ranks", 3, "--bucket-size", "8KiB", "--largest", 2)
    nbytes = sum(tensor.nbytes for tensor in EVERY.values())
    assert (said["name"], said["files"], said["tensors"], said["nbytes"]) == ("step-7", 2, len(EVERY), nbytes)
    assert sum(share["nbytes"] for share in said["dtypes"]) == nbytes
    assert {share["dtype"]: share["tensors"] for share in said["dtypes"]} == {"bfloat16": 20, "float32": 3, "bool": 1}
    assert said["largest"][0]["name"] == "embed"
    assert len(said["largest"]) == 2
    ranks = said["plan"]["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1, 2]
    assert sum(rank["tensors"] for rank in ranks) == len(EVERY)
    assert sum(rank["nbytes"] for rank in ranks) == nbytes
    assert sum(rank["buckets"] for rank in ranks) == said["plan"]["buckets"]
    assert said["plan"]["largest_bucket"] == 500 * 64 * 4
    assert said["plan"]["bucket_size"] == 8192


def test_the_plan_is_the_one_that_registering_gives(checkpoint: Path) -> None:
    server, real = gathered(checkpoint)
    with server:
        imagined = catalog_of_files("step-7", select_directory(checkpoint), 1)
        assert imagined.fingerprint() == real.fingerprint()
        assert [s.tensors for s in imagined.holdings[0].segments] == [s.tensors for s in real.holdings[0].segments]
        contents = read_contents(checkpoint, None, 8192, 0)
        assert contents.fingerprint == real.fingerprint()


def test_catalogs_and_metas_say_the_same_as_the_directory(checkpoint: Path, tmp_path: Path) -> None:
    server, catalog = gathered(checkpoint)
    with server:
        catalog.save(tmp_path / "catalog.json")
        (tmp_path / "step-7.json").write_bytes(metas_to_json(server.get_metas()))
    directory = read_contents(checkpoint, 1, 8192, 3)
    for file in ("catalog.json", "step-7.json"):
        contents = read_contents(tmp_path / file, None, 8192, 3)
        assert contents.files == 0
        assert (contents.fingerprint, contents.nbytes, contents.plan, contents.dtypes, contents.largest) == (
            directory.fingerprint,
            directory.nbytes,
            directory.plan,
            directory.dtypes,
            directory.largest,
        )
    with pytest.raises(SettingError, match="1 ranks already"):
        read_contents(tmp_path / "catalog.json", 2, None, 0)


def test_people_see_tables(checkpoint: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    assert done.exit_code == 0
    for words in ("24 tensors", "fingerprint", "bfloat16", "embed", "500 x 64", "plan:", "rank"):
        assert words in done.stdout, words


def test_what_is_broken_is_named(checkpoint: Path, tmp_path: Path) -> None:
    done = run_command("inspect", tmp_path / "nothing", "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["ok"], said["error"]) == (1, False, "CheckpointFormatError")
    assert "nothing" in done.stderr
    for name, content in (("a.json", b"{}x"), ("b.json", b'{"0": 1}'), ("c.json", b'{"name": "x", "holdings": 3}')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointFormatError, match=name):
            read_contents(tmp_path / name, None, None, 0)
    with pytest.raises(CheckpointFormatError, match=r"no \.safetensors file"):
        read_contents(tmp_path, None, None, 0)
    save_file({"embed": torch.ones(1)}, checkpoint / "c.safetensors")
    with pytest.raises(DuplicateTensorError, match="embed"):
        read_contents(checkpoint, 2, None, 0)
    (checkpoint / "c.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointFormatError, match=r"c\.safetensors"):
        read_contents(checkpoint, 1, None, 0)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1", 1), ("256MiB", 256 << 20), ("2GB", 2 * 10**9), ("1.5 gib", math.floor(1.5 * 2**30)), ("64k", 64000)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1", "MiB", "1TiB", "1e9", "0.2", "∞"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SettingError, match="is not a size"):
        parse_size(text)
