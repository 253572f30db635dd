"""Reload plans: what an engine's loader does to each tensor, recorded once and replayed as plain copies."""
