"""Architectures, presets, saved weights, generation: tensors in, logits out; no text, no runs."""
