#!/usr/bin/env bash
# Makes a virtual environment with the frameworks that people train with: TRL, verl, Ray and SkyRL, on top of vLLM's.
#
#   scripts/make_frameworks_env.sh [DIR]          default: .venvs/frameworks
#
# It sees all that lies in .venvs/vllm (scripts/make_vllm_env.sh): torch, transformers, vLLM and this repository's packages.
# What frameworks ask for besides is left out where the examples and tests do without it; verl asks for an older
# transformers than vLLM 0.32 brings, and runs with that one as far as it is used here. About 40 seconds and 400 MB.
set -euo pipefail

packages=(
    trl==1.16.0 verl==0.9.1 ray==2.60.0 skyrl==0.3.0
    antlr4-python3-runtime==4.9.3 codetiming datasets dill "fsspec<=2026.1" hydra-core msgpack==1.1.2 multiprocess
    omegaconf orjson pandas pyarrow python-dateutil pytz pyvers six "tensordict<=0.10.0" tzdata xxhash
)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${1:-$root/.venvs/frameworks}
python=$target/bin/python
cd "$root"

base=$root/.venvs/vllm
[ -x "$base/bin/python" ] || { echo "error: run scripts/make_vllm_env.sh first" >&2; exit 1; }

uv venv --quiet --seed --clear --python "$base/bin/python" "$target"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
below=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
printf "import site; site.addsitedir('%s')\n" "$below" >"$site/vllm_environment.pth"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps "${packages[@]}"
# Their clients: an example updates both engines at once. The core's entry point is what verl finds it by.
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --editable packages/core --editable packages/sglang-plugin
"$python" -W ignore -c 'import ray, trl, verl.checkpoint_engine' >/dev/null
echo "frameworks are ready in $target"
