"""Others' formats: Transformers, Llama's weights, the authors' checkpoints; nothing trains here."""
