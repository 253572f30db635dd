"""Reads of other hosts' memory, through Mooncake."""
