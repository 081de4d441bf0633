"""Everything that imports triton: what a row is (rows.py), the two kernels and their helpers
(forward.py, backward.py), which program owns which rows (tiles.py), how a kernel is started
(launch.py), and what gatednorm.bench compares with (ceilings.py)."""
