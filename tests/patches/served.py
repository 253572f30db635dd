"""By hand: real `vllm serve` of a patched vLLM on the CPU, updated to and fro, compared with cold starts.

python -m tests.patches.served ENVIRONMENT [--pause MODE] NAME...

In this repository's environment. NAME as in tests/vllm/models.py, with +fp8 one that vLLM quantises itself, such as
wide+fp8.

For each NAME: greedy tokens of cold starts of checkpoints A and B; then a server with dummy weights, brought to A, B,
A, B and A by `checkpoint-engine update`. Prints whether it says the same each time; ends with 1 if it does not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.commands import run_command
from tests.vllm.conftest import Server

HERE = Path(__file__).parent
VLLM_TESTS = HERE.parent / "vllm"
AS_THEY_ARE = ("qwen3", "tied")
"""Models that no kernel is replaced for."""


def serve(environment: Path, model: Path, *options: str) -> Server:
    server = Server(environment / "bin", model, model.parent / "log", *options, PYTHONPATH=str(HERE))
    server.wait()
    return server


def cold_tokens(environment: Path, model: Path, *options: str) -> list[list[int]]:
    server = serve(environment, model, *options)
    try:
        return server.tokens()
    finally:
        server.close()


def update(server: Server, model: Path, pause: str) -> None:
    where = ("--engine", "vllm", "--endpoint", server.endpoint, "--device", "cpu")
    done = run_command("update", model, *where, "--timeout", "120", "--pause", pause, timeout=240)
    if done.returncode:
        raise RuntimeError(done.stderr)


def wrong_after_updates(environment: Path, directory: Path, name: str, pause: str) -> list[str]:
    kind, _, method = name.partition("+")
    names = (kind, f"{kind}-b")
    make = [environment / "bin" / "python", VLLM_TESTS / "models.py", directory, *names]
    subprocess.run(list(map(str, make)), check=True, timeout=120)
    options = [] if name in AS_THEY_ARE else ["--worker-extension-cls", "plain_kernels.Extension"]
    options += ["--quantization", method] if method else []
    cold = {each: cold_tokens(environment, directory / each, *options) for each in names}
    if cold[names[0]] == cold[names[1]]:
        return ["the checkpoints say the same"]
    server = serve(environment, directory / kind, "--load-format", "dummy", *options)
    try:
        wrong = ["dummy weights say the same"] if server.tokens() in cold.values() else []
        for number, each in enumerate((*names, *names, kind)):
            update(server, directory / each, pause)
            wrong += [] if server.tokens() == cold[each] else [f"update {number} to {each}"]
    finally:
        server.close()
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--pause", default="none")
    given = parser.parse_args()
    failed = False
    for name in given.names:
        with tempfile.TemporaryDirectory() as directory:
            wrong = wrong_after_updates(given.environment, Path(directory), name, given.pause)
        print(f"{name}: {'; '.join(wrong) or 'equal'}", flush=True)
        failed = failed or bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
