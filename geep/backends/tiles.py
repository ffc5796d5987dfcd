"""Attention on short packed texts: whole texts are laid into tiles of 128 tokens, attention is dense inside a tile.

A flash kernel starts a block of threads for every (text, head), mostly empty where texts are short (Dao-AILab,
flash-attention issue 591). A tile holds several texts, and a bias keeps them apart. Packed tokens are gathered into
tiles and back by index; the layers see no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geep.backends.mixers import TILE, Mixer
from geep.backends.protocol import Integers


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Where tokens lie in tiles; on the host.

    Attributes:
        tile: Tile of each text, non-decreasing, (num_texts,).
        source: Token in each slot, in free ones the first of the tile, (num_tiles * TILE,).
        text: Text in each slot, -1 in free ones, (num_tiles * TILE,).
        slot: Slot of each token, (num_tokens,).
    """

    tile: Integers
    source: Integers
    text: Integers
    slot: Integers


def plan_tiles(lengths: Integers) -> TilePlan:
    """Lay texts of at most `TILE` tokens into tiles, in order (next-fit), so that a prefix of texts fills a prefix.

    No text is split. The last tile of a prefix may hold texts beyond it.

    Raises:
        ValueError: If a text is longer than a tile.
    """
    longest = int(lengths.max(initial=0))
    if longest > TILE:
        raise ValueError(f"Tiles take texts of at most {TILE} tokens, got one of {longest}; use attention='auto'.")
    ends = np.cumsum(lengths)
    starts = ends - lengths
    # Were a tile to begin with this text, which one would begin the next? Then the chain is followed, tile by tile.
    following = np.searchsorted(ends, starts + TILE, side="right").tolist()
    first, text = [], 0
    while text < len(lengths):
        first.append(text)
        text = following[text]
    num_tiles = len(first) if len(ends) and ends[-1] else 0
    begins = np.zeros(len(lengths), dtype=np.int64)
    begins[first[1:]] = 1
    tile = np.cumsum(begins)
    shift = tile * TILE + starts - starts[np.asarray(first, dtype=np.int64)][tile]
    slot = np.repeat(shift - starts, lengths) + np.arange(int(lengths.sum()))
    source = np.repeat(starts[first[:num_tiles]], TILE)
    source[slot] = np.arange(len(slot))
    owner = np.full(num_tiles * TILE, -1, dtype=np.int64)
    owner[slot] = np.repeat(np.arange(len(lengths)), lengths)
    return TilePlan(tile, source, owner, slot)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Where tokens lie in tiles; on the device.

    Attributes:
        tile: Tile of each text, on the host, (num_texts,).
        source: Token in each slot, (num_tiles * TILE,). Where tokens were let go it may name some of them.
        slot: Slot of each token, (num_tokens,).
        bias: 0 between tokens of one text, -inf elsewhere, (num_tiles, 1, TILE, TILE). Free slots see each other, so
            that no row of scores is all -inf.
        is_cut: Whether tokens were let go.
    """

    tile: NDArray[np.int64]
    source: Tensor
    slot: Tensor
    bias: Tensor
    is_cut: bool = False

    @property
    def num_tiles(self) -> int:
        """Tiles in use."""
        return int(self.bias.shape[0])

    def prefix(self, num_texts: int, num_tokens: int) -> Tiles:
        """Keep the first texts, which have `num_tokens` tokens; all are views."""
        tiles = int(self.tile[num_texts - 1]) + 1 if num_tokens else 0
        return Tiles(
            self.tile[:num_texts], self.source[: tiles * TILE], self.slot[:num_tokens], self.bias[:tiles], is_cut=True
        )


def tile_bias(text: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias of `Tiles` from the text in each slot (num_tiles * TILE,)."""
    text = text.view(-1, 1, TILE)
    other = text.transpose(1, 2) != text  # (num_tiles, TILE, TILE)
    return torch.zeros(other.shape, dtype=dtype, device=text.device).masked_fill_(other, -torch.inf)[:, None]


def attend_tiles(qkv: Tensor, tiles: Tiles, num_heads: int, mixer: Mixer) -> Tensor:
    """Attention inside each text: (num_tokens, 3 hidden) -> (num_tokens, hidden).

    To the mixer tiles are texts of one length. Tokens of a text are as far from each other in a tile as in the text.
    """
    width = qkv.shape[1] // 3
    # The last tile may name tokens that are gone; one that is there stands in, and nobody looks at it.
    source = tiles.source.clamp(max=max(qkv.shape[0] - 1, 0)) if tiles.is_cut else tiles.source
    laid = qkv.index_select(0, source).view(-1, TILE, 3, num_heads, width // num_heads)
    return mixer(laid, tiles.bias).transpose(1, 2).reshape(-1, width).index_select(0, tiles.slot)
