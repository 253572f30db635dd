"""A small tensor-parallel engine of our own, for the demo and for tests."""
