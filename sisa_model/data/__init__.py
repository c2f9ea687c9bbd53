"""Text and synthetic tasks as tokens and blocks, prepared shards of them; no model is built."""
