"""A trained model measured: benchmarks, needles, attention; no training, no comparison of runs."""
