"""Which device to use, and in which precision it is fast."""

import torch

from dtlib.errors import UserError


def choose_device(device: str = "auto") -> str:
    """Return "cuda" for "auto" where there is a card, else "cpu". UserError if it is absent."""
    available = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if device not in ("auto", *available):
        what = f"Device {device!r} is not available: torch sees {' and '.join(available)} here"
        raise UserError(f"{what}. 'cuda' needs a card and a CUDA build of torch; take 'auto'.")
    return available[-1] if device == "auto" else device


def fast_precision(device: str) -> str:
    """Return "bfloat16" where ``device`` multiplies it in hardware, else "float32"."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(False) else "float32"
    return "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"
