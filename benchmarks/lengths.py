"""How the cost of both models grows with the sequence length: training, decoding, state.

    python -m benchmarks.lengths                 # a table, and results/lengths.csv

Training is one forward and backward over one sequence; the time per token should not depend on
its length. Decoding is one step after a prompt of that length; neither its time nor the size of
the state should. The fastest repeat counts.
"""

import torch
import torch.nn.functional as F

from benchmarks import report
from gatednorm.bench.timing import wall_times
from models.config import GatedDeltaNetConfig, Mamba2Config
from models.language_model import LanguageModel

CONFIGS = {
    "gated_deltanet": GatedDeltaNetConfig(hidden_size=128, num_layers=4, num_heads=2, head_dim=64),
    "mamba2": Mamba2Config(hidden_size=128, num_layers=4, d_state=32, head_dim=64),
}

LENGTHS = (1024, 4096, 16384)


def measure(mixer: str, length: int, repeats: int, device: str) -> dict:
    """One row of the table."""
    torch.manual_seed(0)
    model = LanguageModel(CONFIGS[mixer]).to(device)
    tokens = torch.randint(0, 256, (1, length + 1), device=device)

    def train():
        logits, _ = model(tokens[:, :-1])
        F.cross_entropy(logits[0], tokens[0, 1:]).backward()

    training = min(wall_times({"": train}, repeats, device=device)[""])
    with torch.inference_mode():
        _, state = model(tokens[:, :-1], output_state=True)
        step = {"": lambda: model(tokens[:, -1:], state, True)}
        decoding = min(wall_times(step, 30, device=device)[""])
    return {
        "mixer": mixer,
        "tokens": length,
        "training_ms": round(training, 1),
        "training_us_per_token": round(training / length * 1e3, 2),
        "decode_ms_per_token": round(decoding, 2),
        "state_bytes": sum(t.untyped_storage().nbytes() for layer in state for t in layer),
    }


def main() -> None:
    parser = report.parser(__doc__, "lengths.csv")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = [measure(m, n, args.repeats, args.device) for m in CONFIGS for n in LENGTHS]
    report.show(rows)
    report.write(args.out, rows, report.about(args.device))


if __name__ == "__main__":
    main()
