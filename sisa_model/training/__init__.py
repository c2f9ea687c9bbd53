"""How a run trains: batches, steps, validation, checkpoints; what outlives it is in ``runs``."""
