"""A backend of verl. `plugin` registers it, which verl does by itself; see docs/frameworks.md."""
