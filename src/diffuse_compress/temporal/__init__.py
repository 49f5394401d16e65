"""TFMQ: what depends on the timestep, computed once for a schedule and looked up in the loop."""
