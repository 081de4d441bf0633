"""How fast the gated norm is on this machine: `python -m gatednorm.bench`.

The timing, the peers and the ceiling are what the repository's own `benchmarks/` use. Nothing else
in the package imports this one.
"""
