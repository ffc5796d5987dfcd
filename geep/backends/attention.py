"""How packed texts look at themselves, whatever the mixer: by runs of equal lengths, or in one call of our own kernel.

`attend_runs` is the reference, on any device; `PackedAttention` takes the kernel where it runs the mixer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from geep.backends import kernels
from geep.backends.kernels import Mixing, Rounding
from geep.backends.layout import Layout
from geep.backends.mixers import Mixer

Linear = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out,) of a linear layer."""


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """A layer's attention on a CPU.

    Attributes:
        num_heads: Attention heads.
        mixer: How tokens look at each other.
        mixing: The same for the kernel; None: it does not run this, and texts mix by runs of equal lengths.
    """

    num_heads: int
    mixer: Mixer
    mixing: Mixing | None

    @classmethod
    def of(cls, qkv: Linear, num_heads: int, mixer: Mixer) -> Self:
        """Choose for a layer of this matrix."""
        head = len(qkv[0]) // 3 // num_heads
        runs_here = kernels.is_available() and head in kernels.HEADS and qkv[0].dtype in kernels.DTYPES
        return cls(num_heads, mixer, mixer.mixing if runs_here else None)

    def __call__(self, qkv: Tensor, layout: Layout, rounding: Rounding | None = None) -> Tensor:
        """Let every token look at its text.

        Args:
            qkv: Queries, keys and values, (num_tokens, 3 width); may be changed.
            layout: Where the texts lie.
            rounding: Makes the result 8 bits wide; for float32.

        Returns:
            (num_tokens, width).
        """
        if self.mixing is not None:
            return kernels.attend(qkv, layout, self.num_heads, self.mixing, rounding=rounding)
        mixed = attend_runs(qkv, layout, self.num_heads, self.mixer)
        return mixed if rounding is None else rounding(mixed)


def attend_runs(qkv: Tensor, layout: Layout, num_heads: int, mixer: Mixer) -> Tensor:
    """Let every text attend to itself: fused queries, keys and values (num_tokens, 3 width) to (num_tokens, width).

    Rows after the last run, which belong to no text, become zeros. `qkv` may be changed. A CPU mixes bfloat16 in
    float32: without matrix units texts of every length take as long in bfloat16 or longer, and scores are rounded.
    """
    num_tokens, width = qkv.shape[0], qkv.shape[1] // 3
    head = width // num_heads
    out = qkv.new_empty(num_tokens, width)
    if qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu":
        qkv = qkv.float()
    for run in layout.runs:
        stop = run.start + run.num_texts * run.length
        mixed = mixer(qkv[run.start : stop].view(run.num_texts, run.length, 3, num_heads, head))
        out[run.start : stop].view(run.num_texts, run.length, num_heads, head).copy_(mixed.transpose(1, 2))
    out[layout.num_tokens :].zero_()
    return out


def attend_first(first: Tensor, qkv: Linear, num_heads: int, mix: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Attention of the first tokens (num_texts, hidden) of texts over their texts; same shape out.

    Neither keys nor values of the other tokens are computed. A query meets a key as q·(K x + b) = (Kᵀ q)·x + q·b; the
    last term is the same for all tokens of a text and falls out of the softmax. The weights p of a text sum to one, so
    Σ p (V x + b) = V Σ p x + b. Exact but for rounding; about a twentieth of a layer's work at 25 tokens a text.

    Args:
        first: Hidden states before the layer.
        qkv: The layer's matrix (3 hidden, hidden) and bias.
        num_heads: Attention heads.
        mix: Given queries (num_texts, num_heads, hidden) and the scale of their scores, the softmax-weighted means of
            the hidden states of each text's tokens; same shape.
    """
    (weight, bias), width = qkv, first.shape[1]
    key, value = weight[width:].view(2, num_heads, width // num_heads, width)
    query = F.linear(first, weight[:width], None if bias is None else bias[:width]).view(len(first), num_heads, -1)
    means = mix(torch.einsum("nhd,hdw->nhw", query, key), (width // num_heads) ** -0.5)
    mixed = torch.einsum("nhw,hdw->nhd", means, value).reshape(len(first), width)
    return mixed if bias is None else mixed + bias[2 * width :]


def mix_runs(query: Tensor, scale: float, hidden: Tensor, layout: Layout) -> Tensor:
    """The `mix` of `attend_first` by runs of equal lengths: each is a view of the hidden states."""
    out, text = torch.empty_like(query), 0
    for run in layout.runs:
        tokens = hidden[run.start : run.start + run.num_texts * run.length].view(run.num_texts, 1, run.length, -1)
        rows = slice(text, text + run.num_texts)
        out[rows] = F.scaled_dot_product_attention(query[rows, None], tokens, tokens, scale=scale)[:, 0]
        text += run.num_texts
    return out
