"""A run's settings, folder, record and rows: nothing here trains, evaluates or draws."""
