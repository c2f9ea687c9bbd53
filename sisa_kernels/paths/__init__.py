"""The ways to compute SISA attention on stock kernels; the choice among them is not made here."""
