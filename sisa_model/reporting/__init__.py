"""Figures and tables of plain rows and arrays; reads no run, imports no data and no models."""
