"""Speed, accuracy and their figures: ``python -m bench`` from a checkout."""
