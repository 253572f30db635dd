"""A whole step, simulated: the product's own plans, wires of measured rates, and events."""
