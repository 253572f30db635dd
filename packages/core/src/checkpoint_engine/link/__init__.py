"""The control channel between a parameter-server rank and an engine worker."""
