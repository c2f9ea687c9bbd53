"""Training: batches, the step, validation, checkpoints, many processes. No command reads a run
through it; what outlives a run is in :mod:`sisa_model.runs`.
"""
