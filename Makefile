# The five commands of a change; CONTRIBUTING.md says when which.
.PHONY: check fast test engines docs

check:  # lint, floors, types: half a minute
	uv run ruff check .
	uv run ruff format --check .
	uv run lint-imports --no-logo
	uv run pyright

fast:  # what needs no other process: under half a minute
	uv run pytest -m fast

test:  # the tests, and those that take longer
	uv run pytest
	uv run pytest -m long

engines:  # real vLLM and real SGLang on the CPU; makes their environments first
	scripts/make_vllm_env.sh
	scripts/make_sglang_env.sh
	uv run pytest -n 2 tests/vllm tests/patches -m "vllm and not endurance"
	uv run pytest -n 2 tests/sglang -m "sglang and not endurance"

docs:  # the site, in build/site; a link that leads nowhere is an error
	uv run --group docs mkdocs build --strict --quiet
