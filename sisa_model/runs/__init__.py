"""A run's settings, its folder and record, its rows: what every command that makes or reads runs
shares. Nothing here trains, evaluates or draws.
"""
