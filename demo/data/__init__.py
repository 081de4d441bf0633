"""From where text lies to batches of tokens."""
