"""Two blocks around the gated norm, Gated DeltaNet and Mamba-2: their scans, a language model, and
its generation. What train.py and infer.py need around them is in demo/."""
