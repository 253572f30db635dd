"""The engine's side: what an adapter does, how updates are received, and a reference engine."""
