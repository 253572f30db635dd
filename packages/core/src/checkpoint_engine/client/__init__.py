"""Asking a running engine."""
