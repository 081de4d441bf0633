"""What train.py does: a run, its processes, its folder, and how a stopped one is resumed."""
