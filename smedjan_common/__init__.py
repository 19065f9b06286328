"""What both backends share: configuration, data, tokenizer, checkpoints, the training loop. No array framework but NumPy."""

__version__ = "0.1.0"
