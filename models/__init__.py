"""Gated DeltaNet and Mamba-2 around gatednorm: two scans, two blocks, a small language model."""
