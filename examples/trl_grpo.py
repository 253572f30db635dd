"""TRL's GRPO trainer, whose rollouts come from a serving vLLM that gets the new weights after every step.

    VLLM_PLUGINS=checkpoint_engine vllm serve MODEL --served-model-name policy --port 8000 &
    python examples/trl_grpo.py MODEL http://127.0.0.1:8000

Nothing of TRL's own weight transfer is used: a callback publishes, and `rollout_func` asks the server. The policy
learns to write the letter "e". It runs on the CPU. MODEL is a directory with a small model that transformers knows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import httpx
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from checkpoint_engine.ps import ParameterServer
from checkpoint_engine_vllm import VllmClient

PROMPT = "The capital of France is"
ROLLOUTS, LENGTH, TIMEOUT = 8, 12, 120.0


class Publisher(TrainerCallback):
    """Has the engine serve what the trainer has, before the first step and after every one."""

    def __init__(self, endpoint: str) -> None:
        self.ps = ParameterServer(rank=0, world_size=1)
        self.engine = VllmClient(endpoint)

    def publish(self, model: Any, version: str) -> None:
        """Returns once the engine serves these weights."""

        def ask(handles: Sequence[tuple[str, str]]) -> None:
            self.engine.update_weights(dict(handles), version=version, pause="keep", reset_caches=True, timeout=TIMEOUT)

        self.ps.publish(model.state_dict(), ask, version=version)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """TRL's."""
        self.publish(model, "step-0")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """TRL's."""
        self.publish(model, f"step-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """TRL's."""
        self.ps.close()


def complete(endpoint: str, prompt: str, count: int, temperature: float) -> list[dict[str, Any]]:
    """What the engine writes, with its tokens and their probabilities."""
    order = {
        "model": "policy",
        "prompt": prompt,
        "n": count,
        "max_tokens": LENGTH,
        "temperature": temperature,
        "logprobs": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{endpoint}/v1/completions", json=order, timeout=TIMEOUT)
    answer.raise_for_status()
    return answer.json()["choices"]


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of letters that are "e"."""
    return [text.count("e") / max(1, len(text)) for text in completions]


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("endpoint")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        found = [complete(options.endpoint, prompt, 1, 1.0)[0] for prompt in prompts]
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [choice["token_ids"] for choice in found],
            "logprobs": [choice["logprobs"]["token_logprobs"] for choice in found],
        }

    publisher = Publisher(options.endpoint)
    with tempfile.TemporaryDirectory() as directory:
        config = GRPOConfig(
            directory,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            per_device_train_batch_size=ROLLOUTS,
            num_generations=ROLLOUTS,
            max_completion_length=LENGTH,
            max_steps=options.steps,
            learning_rate=1e-3,
            beta=0.0,
        )
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(options.model, dtype="bfloat16"),
            reward,
            config,
            Dataset.from_list([{"prompt": PROMPT}] * ROLLOUTS),
            processing_class=tokenizer,
            callbacks=[publisher],
            rollout_func=rollout,
        )
        before = complete(options.endpoint, PROMPT, 1, 0.0)[0]["text"]
        trainer.train()
    print(f"before: {before!r}\nafter: {complete(options.endpoint, PROMPT, 1, 0.0)[0]['text']!r}", flush=True)


if __name__ == "__main__":
    main()
