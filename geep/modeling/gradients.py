"""Gradients that come back otherwise than the loss sends them. Where they do is not known here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def scaled_gradient(values: Tensor, scale: float) -> Tensor:
    """Return `values` as they are, a view; the gradient that comes back through it is multiplied by `scale`.

    A pair of them around each classifier makes gradient equilibrium (Li et al., ICCV 2019): its re-scaling modules.
    """
    return _ScaledGradient.apply(values, scale)  # type: ignore[no-untyped-call]
