"""Tiny random checkpoints of as many architectures as an engine lists, and what an update makes of each."""
