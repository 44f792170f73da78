"""Text to tokens to batches: tokenizer, preparation, indexed datasets, deterministic order, loader."""
