"""Everything that imports triton: what a row is (rows.py), the two kernels and their helpers
(forward.py, backward.py), FP8 (fp8.py), what ranks know of a row (ranks.py), which program owns
which rows (tiles.py), how a kernel is started (launch.py, launch_fp8.py), and what gatednorm.bench
compares with (ceilings.py)."""
