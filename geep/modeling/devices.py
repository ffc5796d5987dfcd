"""Devices that a model can be moved to."""

from __future__ import annotations

import torch


def usable_device(asked: str) -> torch.device:
    """The device of a name, tried.

    Raises:
        ValueError: If torch does not know it, or finds none here.
    """
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={asked!r} was asked for, but torch finds no CUDA device; use device='cpu'.")
    reason = "it holds no numbers"
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
        if device.type != "meta":
            return device
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has no one word for it
        reason = str(error).partition("\n")[0]
    raise ValueError(
        f"device={asked!r} is none that torch can use here ({reason[:200]}); expected 'cpu' or, with an NVIDIA GPU, "
        "'cuda' or 'cuda:N'. Leave it out for a GPU where there is one."
    )
