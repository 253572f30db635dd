"""The engine worker's side of an update."""
