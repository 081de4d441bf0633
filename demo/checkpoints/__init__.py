"""What a run leaves behind and `load` reads: weights, their config, their tokenizer."""
