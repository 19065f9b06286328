"""From raw text to batches: reading inputs, the token file, the order of batches."""
