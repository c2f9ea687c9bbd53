"""The Triton kernels and what runs around them; only here is the package triton imported."""
