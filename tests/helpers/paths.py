"""The two ways to run the norm here; imported before triton, which it tells what to run on."""

import importlib.util
import os

import torch

GPU = torch.cuda.is_available()
if not GPU:  # must be in place before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"
TRITON = importlib.util.find_spec("triton") is not None


class NormPath:
    """One way to run the norm: where the tensors lie, whether the kernels run, which dtypes."""

    def __init__(self, name: str):
        self.kernels = name == "kernels"
        self.device = "cuda" if self.kernels and GPU else "cpu"
        # The interpreter truncates where bf16 is stored; bf16 is judged on the GPU alone.
        self.dtypes = [torch.float32, torch.float16]
        if not self.kernels or GPU:
            self.dtypes.append(torch.bfloat16)
        if not self.kernels:
            self.dtypes.append(torch.float64)

    def __repr__(self) -> str:
        return "kernels" if self.kernels else "cpu"
