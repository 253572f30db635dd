"""Pure functions: what moves when, and where it goes. No device, no I/O."""
