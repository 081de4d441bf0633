"""Which cases benchmarks/gated_norm.py times, and what it draws."""

from gatednorm.bench.cases import Case
from gatednorm.bench.providers import PROVIDERS

CASES = (
    Case(262144, 128),
    Case(262144, 128, z_strided=True),
    Case(16384, 2048, norm_before_gate=False, z_strided=True),
    Case(16384, 5120, norm_before_gate=False, z_strided=True),
    Case(8192, 8192, 1024, norm_before_gate=False, z_strided=True),
    Case(16384, 4096),
    Case(4096, 16384),
    Case(4096, 16384, norm_before_gate=False),
    Case(131072, 256),
    Case(30011, 1000, is_rms_norm=False, bias=True, activation="sigmoid"),
    Case(20011, 1536, norm_before_gate=False),
    Case(10007, 3072, bias=True),
    Case(16384, 2048, norm_before_gate=False, is_rms_norm=False, bias=True),
)
DECODE = (Case(2048, 128), Case(64, 5120, norm_before_gate=False))
WIDTHS = tuple(Case(2**25 // width, width) for width in (64, 128, 256, 512, 1024, 2048, 4096, 8192))
ROWS = tuple(Case(2**k, 4096, norm_before_gate=False) for k in range(4, 16, 2))
# What the plots show: torch.compile would compile anew for every point.
QUICK = [n for n in PROVIDERS if n not in ("transformers", "eager", "torch.compile")]
