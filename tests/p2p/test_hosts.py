"""Two hosts with two ranks each hold a checkpoint; an engine on a third host joins, over the network between them."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from tests.commands import command_line, run
from tests.core.engines import assert_holds
from tests.core.p2p_help import needs_mooncake
from tests.p2p.hosts import Network, why_not
from tests.p2p.seeding import ENVIRONMENT, seeds

pytestmark = [pytest.mark.long, needs_mooncake, pytest.mark.skipif(bool(why_not()), reason=why_not())]

SPEC = ModelSpec(experts=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "step-1", SPEC, 1, shards=4)


def join(network: Network, host: int, metas: Path, endpoint: str, *more: str) -> subprocess.CompletedProcess[str]:
    options = ("--engine", "reference", "-tp", "2", "--endpoint", endpoint, "--device", "cpu", "--json", *more)
    command = command_line("join", "--metas", metas, *options)
    return run(network.command(host, command), environment=ENVIRONMENT)


def test_an_engine_on_a_third_host_joins_and_hears_when_a_host_is_gone(checkpoint: Path, tmp_path: Path) -> None:
    metas = tmp_path / "metas.json"
    with (
        Network(3) as network,
        ReferenceProcess(SPEC.to_json(), 2, uds=str(tmp_path / "engine.sock")) as engine,
        seeds(network, checkpoint, metas) as processes,
    ):
        addresses = [holding.p2p_address or "" for holding in Catalog.load(metas).holdings]
        assert [address.rpartition(":")[0] for address in addresses] == [network.address(host) for host in (0, 0, 1, 1)]
        joined = join(network, 2, metas, engine.endpoint)
        assert joined.returncode == 0, joined.stderr
        assert json.loads(joined.stdout)["method"] == "p2p"
        assert_holds(engine, checkpoint)
        for process in processes[2:]:
            process.send_signal(signal.SIGKILL)
        refused = join(network, 2, metas, engine.endpoint, "--wait", "1")
        assert refused.returncode == 1
        assert f"at {network.address(1)}:" in refused.stderr
        assert "nobody listens there" in refused.stderr
