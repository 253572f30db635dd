"""What an engine plugin and the core owe each other."""
