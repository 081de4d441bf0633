"""What infer.py does: prompts in, texts or measurements out."""
