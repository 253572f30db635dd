"""Backends for vLLM's own weight transfer (init, start, update, finish), chosen by `--weight-transfer-config`."""
