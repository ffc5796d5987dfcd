"""How the tokens of a text look at each other: the part of a packed layer in which families differ most.

A mixer takes queries, keys and values of texts of equal length and gives what each token takes over from its text. It
sees positions only as distances between tokens. So texts may also lie side by side in a block of one length, kept apart
by a bias (`geep.backends.tiles`). Read `Mixer`, then `mixers_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from geep.backends.kernels import LANES, Mixing
from geep.backends.layout import check_reach

TILE = 128
"""Tokens of a tile (`geep.backends.tiles`): tables of distances reach across one, however few positions there are."""

# Distances share as many numbers in MPNet, whatever its config says.
_MPNET_BUCKETS = 32


class Mixer(Protocol):
    """One layer's attention, with all that it knows of positions."""

    def __call__(self, block: Tensor, bias: Tensor | None = None) -> Tensor:
        """Let every token look at its text.

        Args:
            block: Queries, keys and values, (num_texts, length, 3, num_heads, head); may be changed in place.
            bias: Added to the scores, (num_texts, 1, length, length).

        Returns:
            (num_texts, num_heads, length, head).
        """

    @property
    def mixing(self) -> Mixing:
        """The same for the kernel, made once however many layers share the mixer."""


@dataclass(frozen=True)
class DotProduct:
    """Scaled dot product, blind to positions (BERT).

    Attributes:
        scale: Of the scores; None: one over the root of a head's width.
    """

    scale: float | None = None

    def __call__(self, block: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Mixer`."""
        query, key, value = block.permute(2, 0, 3, 1, 4)  # each (num_texts, num_heads, length, head)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)

    @cached_property
    def mixing(self) -> Mixing:
        """See `Mixer`."""
        return Mixing(self.scale)


@dataclass(frozen=True)
class DistanceBias:
    """Scaled dot product and, for each head, a number for each distance between two tokens (MPNet).

    Attributes:
        table: The number for distance key - query at column distance + (columns - 1) / 2, (num_heads, columns).
    """

    table: Tensor

    def __call__(self, block: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Mixer`."""
        query, key, value = block.permute(2, 0, 3, 1, 4)
        own = by_distance(self.table.to(block.dtype), block.shape[1])[None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=own if bias is None else own + bias)

    @cached_property
    def mixing(self) -> Mixing:
        """See `Mixer`."""
        return Mixing(bias=_with_margins(self.table), reach=_reach(self.table))


def by_distance(table: Tensor, length: int) -> Tensor:
    """Lay out values for distances (…, columns), as `DistanceBias.table` has them, as (…, length, length)."""
    # Row i of the result is columns length - 1 - i … of these; rows are copied whole, so this is as fast as a copy.
    return middle_of(table, length).unfold(-1, length, 1).flip(-2)


def _reach(table: Tensor) -> int:
    """Tokens of the longest text whose distances all have columns."""
    return table.shape[-1] // 2 + 1


def _with_margins(table: Tensor) -> Tensor:
    """A table of distances for the kernel, which reads beyond the longest text."""
    return F.pad(table.float(), (LANES, LANES))


def middle_of(table: Tensor, length: int) -> Tensor:
    """The columns of a table of distances that occur in a text: (…, columns) to (…, 2 length - 1).

    Raises:
        ValueError: If the table does not reach as far.
    """
    check_reach(length, _reach(table))
    middle = table.shape[-1] // 2
    return table[..., middle - length + 1 : middle + length]


@dataclass(frozen=True)
class Rotary:
    """Queries and keys turned by their position; in some layers tokens see only those around them (ModernBERT).

    The coordinates that are turned together lie side by side: `paired` puts the weights into this order.

    Attributes:
        turns: Turn of each pair of coordinates at each position, complex, (positions, head / 2).
        window: Largest distance at which tokens see each other; None: any.
        seen: 0 for distances up to the window, else -inf, a table as `DistanceBias` has one for a single head.
    """

    turns: Tensor
    window: int | None
    seen: Tensor

    @classmethod
    def of(cls, turns: Tensor, window: int | None, dtype: torch.dtype) -> Self:
        """Make the table of what is seen, for values of a dtype."""
        distance = torch.arange(1 - len(turns), len(turns), device=turns.device).abs()[None]
        seen = torch.zeros(distance.shape, dtype=dtype, device=turns.device)
        return cls(turns, window, seen if window is None else seen.masked_fill_(distance > window, -torch.inf))

    def __call__(self, block: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Mixer`."""
        length = block.shape[1]
        check_reach(length, len(self.turns))
        turned = block[:, :, :2]
        precise = turned.to(self.turns.real.dtype)  # half precision would be too coarse; else the same memory
        torch.view_as_complex(precise.unflatten(-1, (-1, 2))).mul_(self.turns[:length, None, None])
        if precise is not turned:
            turned.copy_(precise)
        if self.window is not None and length > self.window + 1:
            if bias is None and 0 < _BANDS_FROM * self.window <= length:
                return self._in_bands(block, self.window)
            seen = by_distance(self.seen.to(block.dtype), length)[None]
            bias = seen if bias is None else seen + bias
        query, key, value = block.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    @cached_property
    def mixing(self) -> Mixing:
        """See `Mixer`."""
        cosines, sines = self.turns.real, self.turns.imag
        both = [cosines.repeat_interleave(2, 1), torch.stack([-sines, sines], 2).flatten(1)]
        bias = None if self.window is None else _with_margins(self.seen)
        turns = torch.stack(both, 1).float()
        return Mixing(bias=bias, turns=turns, window=self.window, reach=len(self.turns))

    def _in_bands(self, block: Tensor, window: int) -> Tensor:
        """Mix a long text in time that grows with its length.

        It is cut into pieces as long as the window, so the tokens of one see no further than its two neighbours.
        """
        num_texts, length, _, num_heads, head = block.shape
        pieces = -(-length // window)
        missing = pieces * window - length
        # Queries (num_texts · pieces, num_heads, window, head), keys and values the same of three windows.
        query = F.pad(block[:, :, 0], (0, 0, 0, 0, 0, missing)).view(-1, window, num_heads, head).transpose(1, 2)
        around = F.pad(block[:, :, 1:], (0, 0, 0, 0, 0, 0, window, window + missing)).unfold(1, 3 * window, window)
        key, value = around.permute(2, 0, 1, 3, 5, 4).flatten(1, 2)
        # What a piece sees is the middle third of what a text of three windows does. A row is never all -inf.
        seen = by_distance(self.seen[0].to(block.dtype), 3 * window)[window : 2 * window].repeat(pieces, 1, 1)
        seen[0, :, :window] = -torch.inf
        for place in (1, 2):  # pieces that look beyond the end
            seen[-place, :, (place + 1) * window - missing :] = -torch.inf
        bias = seen[:, None].expand(num_texts, *seen[:, None].shape).flatten(0, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return mixed.transpose(1, 2).reshape(num_texts, -1, num_heads, head)[:, :length].transpose(1, 2)


# Windows in a text from which on bands pay for their copies.
_BANDS_FROM = 5


def paired(weight: Tensor, num_heads: int) -> Tensor:
    """Put the rows of a query's or key's weight (num_heads · head, …) so that what `Rotary` turns lies side by side.

    Hugging Face turns coordinate d together with d + head / 2. Scores do not depend on the order of coordinates.
    """
    return weight.view(num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class Disentangled:
    """Scaled dot product, and products of contents with the vectors of distances (DeBERTa, He et al. 2021).

    The score of query i and key j is scale · (qᵢ·kⱼ + qᵢ·pᵢ₋ⱼ + kⱼ·rᵢ₋ⱼ). The vectors p and r of a distance are
    projections of weights, so they are made once.

    Attributes:
        scale: Of the scores.
        keys: Vectors p of the buckets of distances, times `scale`, (num_heads, buckets, head); None: no such part.
        queries: Vectors r, likewise.
        rows: Bucket of distance query - key at column distance + (columns - 1) / 2, (columns,).
    """

    scale: float
    keys: Tensor | None
    queries: Tensor | None
    rows: Tensor

    def __call__(self, block: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Mixer`."""
        rows = middle_of(self.rows, block.shape[1])
        parts = [] if bias is None else [bias.transpose(0, 1)]
        if self.keys is not None:
            parts.append(_shifted(block[:, :, 0], self.keys.index_select(1, rows.flip(0)).to(block.dtype)))
        if self.queries is not None:
            parts.append(_shifted(block[:, :, 1], self.queries.index_select(1, rows).to(block.dtype)).transpose(2, 3))
        scores = parts[0]
        for part in parts[1:]:
            scores = scores + part
        query, key, value = block.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=scores.transpose(0, 1), scale=self.scale)

    @cached_property
    def mixing(self) -> Mixing:
        """See `Mixer`."""
        num_heads, head = next((len(x), x.shape[2]) for x in (self.keys, self.queries) if x is not None)

        def tables(vectors: Tensor | None) -> Tensor:
            """Vectors by key - query, each coordinate a table of its own: (num_heads, head, columns)."""
            if vectors is None:
                return torch.zeros(num_heads, head, len(self.rows) + 2 * LANES)
            return _with_margins(vectors.index_select(1, self.rows.flip(0)).transpose(1, 2)).contiguous()

        # The kernel multiplies queries by the scale before they meet anything.
        content = tables(self.keys) / self.scale
        return Mixing(self.scale, distances=(content, tables(self.queries)), reach=_reach(self.rows))


def _shifted(contents: Tensor, vectors: Tensor) -> Tensor:
    """Multiply contents (num_texts, length, heads, head) with vectors (heads, 2 length - 1, head), shifted by place.

    Returns:
        The product of the content at place a with vector b - a + length - 1, at [a, b]: (heads, num_texts, length,
        length), a view.
    """
    num_texts, length, num_heads, head = contents.shape
    width = vectors.shape[1]
    by_head = contents.permute(2, 0, 1, 3).reshape(num_heads, num_texts * length, head)
    products = torch.bmm(by_head, vectors.transpose(1, 2))
    # Going down a row is going one column less far: no element has to be moved.
    strides = (num_texts * length * width, length * width, width - 1, 1)
    return products.as_strided((num_heads, num_texts, length, length), strides, length - 1)


def mixes_plainly(config: PreTrainedConfig) -> bool:
    """Whether positions reach an encoder's tokens by their embeddings alone."""
    return config.model_type not in _MAKE


def why_not_mixed(config: PreTrainedConfig) -> str | None:
    """Say what in a config makes attention other than any mixer; None where nothing does."""
    if config.model_type == "mpnet" and config.relative_attention_num_buckets < _MPNET_BUCKETS:
        found = config.relative_attention_num_buckets
        return f"Packed layers have relative_attention_num_buckets={_MPNET_BUCKETS}, the encoder's config has {found}"
    if config.model_type == "modernbert":
        for kind in set(config.layer_types):
            rope = config.rope_parameters.get(kind)
            if kind not in ("full_attention", "sliding_attention") or rope is None or rope["rope_type"] != "default":
                return f"Packed layers turn by fixed frequencies, the encoder's config has {rope} for {kind!r}"
    return None


def telling_length(config: PreTrainedConfig) -> int:
    """Tokens of a text in which distances of every kind occur: each its own, those that share, those that see none."""
    if config.model_type == "mpnet":
        return _MPNET_BUCKETS
    if config.model_type == "deberta-v2" and config.relative_attention:
        return max(getattr(config, "position_buckets", -1) // 2 + 3, 6)
    return config.sliding_window + 2 if config.model_type == "modernbert" else 6


def mixers_of(encoder: Any, layers: Sequence[Any]) -> list[Mixer]:
    """The mixers of an encoder's layers, one for each.

    Args:
        encoder: One of `FAMILIES`, whose config `why_not_packed` has nothing against.
        layers: Its layers in the order in which they run; some may be the same.
    """
    make = _MAKE.get(encoder.config.model_type)
    with torch.no_grad():
        return [DotProduct()] * len(layers) if make is None else make(encoder, layers)


def _distances(encoder: Any) -> Tensor:
    """All distances for which there are to be columns, ascending, on the encoder's device."""
    reach = max(encoder.config.max_position_embeddings, TILE)
    return torch.arange(1 - reach, reach, device=encoder.device)


def _mpnet(encoder: Any, layers: Sequence[Any]) -> list[Mixer]:
    rows = encoder.encoder.relative_position_bucket(_distances(encoder))
    table = encoder.encoder.relative_attention_bias(rows).t().contiguous()
    return [DistanceBias(table.detach())] * len(layers)


def _deberta(encoder: Any, layers: Sequence[Any]) -> list[Mixer]:
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    vectors = encoder.encoder.get_rel_embedding()

    @cache  # of a model all layers have the same
    def rows_of(buckets: int, farthest: int, span: int) -> Tensor:
        distances = _distances(encoder)
        if buckets > 0 and farthest > 0:
            distances = make_log_bucket_position(distances, buckets, farthest).long()
        return (distances + span).clamp_(0, 2 * span - 1)

    def by_head(rows: Tensor) -> Tensor:
        return rows.detach().unflatten(1, (encoder.config.num_attention_heads, -1)).transpose(0, 1).contiguous()

    def mixer(layer: Any) -> Mixer:
        own = layer.attention.self
        kinds = [kind for kind in ("c2p", "p2c") if kind in own.pos_att_type]
        scale = (own.attention_head_size * (1 + len(kinds))) ** -0.5
        if vectors is None or not kinds:
            return DotProduct(scale)
        span = own.pos_ebd_size
        prefix = "" if own.share_att_key else "pos_"
        keys, queries = (
            by_head(scale * getattr(own, prefix + name)(vectors[: 2 * span])) if kind in kinds else None
            for kind, name in (("c2p", "key_proj"), ("p2c", "query_proj"))
        )
        return Disentangled(scale, keys, queries, rows_of(own.position_buckets, own.max_relative_positions, span))

    return [mixer(layer) for layer in layers]


def _modernbert(encoder: Any, layers: Sequence[Any]) -> list[Mixer]:
    config = encoder.config
    precise = torch.promote_types(encoder.dtype, torch.float32)
    # Made anew: the encoder's own frequencies were rounded when it was cast.
    rotary = type(encoder.rotary_emb)(config).to(precise)
    positions = torch.arange(max(config.max_position_embeddings, TILE))[None]
    turns = {}
    for kind in set(config.layer_types):
        cos, sin = rotary(torch.zeros(1, dtype=precise), positions, kind)
        half = cos.shape[-1] // 2
        turns[kind] = torch.complex(cos[0, :, :half], sin[0, :, :half]).to(encoder.device)
    windows = {"sliding_attention": config.sliding_window, "full_attention": None}
    kinds = [layer.attention_type for layer in layers]
    made = {kind: Rotary.of(turns[kind], windows[kind], encoder.dtype) for kind in turns}
    return [made[kind] for kind in kinds]


_MAKE: Mapping[str, Callable[[Any, Sequence[Any]], list[Mixer]]] = {
    "mpnet": _mpnet,
    "deberta-v2": _deberta,
    "modernbert": _modernbert,
}
