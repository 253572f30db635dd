"""The `checkpoint-engine` command."""
