"""`python -m checkpoint_engine` is the same as the `checkpoint-engine` command."""

from checkpoint_engine.cli.main import main

main()
