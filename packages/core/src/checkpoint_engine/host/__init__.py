"""What this machine is like: memory, NUMA nodes, network cards."""
