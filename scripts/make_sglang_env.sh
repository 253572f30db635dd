#!/usr/bin/env bash
# Makes a virtual environment in which real SGLang runs on the CPU, with two packages of this repository in it.
#
#   scripts/make_sglang_env.sh [DIR]          default: .venvs/sglang
#
# Needs uv, Python 3.11 (uv fetches one if there is none) and a pip that finds a CPU build of torch: PyPI's Linux builds
# are for CUDA. If pip is not set up for that, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS may say where CPU wheels lie.
# About one and a half minutes and 2 GB. Does nothing when DIR is up to date.
set -euo pipefail

sglang_version=0.5.23
torch_version=2.13.0
python_version=3.11

# SGLang asks for three times as much; what it needs only on a GPU is left out.
no_dependencies=("sglang==$sglang_version" "xgrammar==0.2.7" "compressed-tensors==0.18.0" "torchvision==0.28.0")
needed=(
    aiohttp apache-tvm-ffi==0.1.11 dill distro einops fastapi gguf httpx IPython jsonschema loguru mistral_common msgspec
    numpy openai==2.8.0 orjson partial_json_parser pillow prometheus-client psutil pybase64 pydantic python-multipart
    pyzmq regex requests safetensors scipy sentencepiece==0.2.1 setproctitle soundfile==0.13.1 tiktoken
    tokenizers==0.23.2 tqdm transformers==5.19.0 "uvicorn>=0.51" uvloop watchfiles xxhash zstandard
)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${1:-$root/.venvs/sglang}
python=$target/bin/python
stamp=$target/.checkpoint-engine-inputs
cd "$root"

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

engine_inputs=$(find scripts/make_sglang_env.sh scripts/sglang_cpu_shims -type f -not -name '*.pyc' | sort | xargs cat | sha256sum)
package_inputs=$(cat packages/core/pyproject.toml packages/sglang-plugin/pyproject.toml <(echo "$root") | sha256sum)
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

install_packages() {
    say "this repository's packages"
    pip install --quiet "torch==$torch_version" --editable packages/core --editable packages/sglang-plugin
    printf '%s\n%s\n' "$engine_inputs" "$package_inputs" >"$stamp"
}

if [ -x "$python" ] && [ "$(sed -n 1p "$stamp" 2>/dev/null)" = "$engine_inputs" ]; then
    [ "$(sed -n 2p "$stamp")" = "$package_inputs" ] || install_packages
    say "$target is up to date"
    exit 0
fi
command -v uv >/dev/null || die "uv is not installed; see its documentation (https://docs.astral.sh/uv)"

say "Python $python_version in $target"
uv venv --quiet --seed --clear --python "$python_version" "$target"

say "torch $torch_version for the CPU"
pip install --quiet "torch==$torch_version"
"$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || die \
    "pip installed a CUDA build of torch $torch_version; tell it where CPU builds lie (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)"

say "SGLang $sglang_version, and what it needs on the CPU"
pip install --quiet "${needed[@]}"
pip install --quiet --no-deps "${no_dependencies[@]}"

say "stand-ins for SGLang's compiled kernels and for Triton"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp -R scripts/sglang_cpu_shims/sgl_kernel scripts/sglang_cpu_shims/cpu_stand_ins.* "$site/"

install_packages
SGLANG_USE_CPU_ENGINE=1 "$python" -W ignore -c 'import sglang.srt.entrypoints.http_server' >/dev/null
say "SGLang $sglang_version is ready in $target"
