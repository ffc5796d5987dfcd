"""Where texts lie in a row of tokens, one text after another, and what heads derive from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Where packed texts lie.

    What follows from it is computed when a head first asks, and kept: the same texts meet many exits, and on few tokens
    such indices take longer than the products. Nothing waits for the device.

    Attributes:
        offsets: Where each text begins, and the end of the last: from 0 to num_tokens, integers, (num_texts + 1,).
        num_tokens: Tokens of all texts.
        longest: Tokens of the longest text, or more.
        firsts: Tokens of the first text of each pair, (num_texts,), as `first_lengths_packed` counts; the others are of
            the second. None: no text has a second one.
    """

    offsets: Tensor
    num_tokens: int
    longest: int
    firsts: Tensor | None = None

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each text, (num_texts,)."""
        return self.offsets.diff()

    @cached_property
    def places(self) -> Tensor:
        """Numbers of all tokens, (num_tokens,)."""
        return torch.arange(self.num_tokens, dtype=self.offsets.dtype, device=self.offsets.device)

    @cached_property
    def texts(self) -> Tensor:
        """Number of each token's text, int64, (num_tokens,)."""
        numbers = torch.arange(len(self.lengths), device=self.offsets.device)
        return numbers.repeat_interleave(self.lengths, output_size=self.num_tokens)

    @cached_property
    def parts(self) -> Spans:
        """The two texts of every pair as texts of their own, in order; the second of a single text is empty."""
        starts, ends = self.offsets[:-1], self.offsets[1:]
        seconds = ends if self.firsts is None else starts + self.firsts.to(self.offsets.dtype)
        borders = torch.cat([torch.stack([starts, seconds], 1).flatten(), self.offsets[-1:]])
        return Spans(borders, self.num_tokens, self.longest)

    def neighbours(self, reach: int) -> Tensor:
        """Numbers of the tokens around each, (num_tokens * (2 reach + 1),); num_tokens where a text has none there."""
        if reach not in self._neighbours:
            steps = torch.arange(-reach, reach + 1, dtype=self.offsets.dtype, device=self.offsets.device)
            there = self.places[:, None] + steps
            first, stop = self.offsets[:-1][self.texts, None], self.offsets[1:][self.texts, None]
            inside = (there >= first) & (there < stop)
            self._neighbours[reach] = torch.where(inside, there, self.num_tokens).flatten()
        return self._neighbours[reach]

    @cached_property
    def _neighbours(self) -> dict[int, Tensor]:
        return {}
