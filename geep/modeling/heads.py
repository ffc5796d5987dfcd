"""Classifiers: hidden states of texts to logits. Where a head sits is not known here."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from geep.modeling.spans import Spans


class HeadConfig(Protocol):
    """What a head reads of a model's config."""

    @property
    def hidden_size(self) -> int:
        """Width of the encoder's hidden states."""

    exit_hidden_size: int
    classifier_dropout: float | int
    separator_id: int | None

    @property
    def num_labels(self) -> int | None:
        """Logits to give."""


def first_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden state (batch, hidden) of each text's first token: at the left, unless the padding is there."""
    place = attention_mask.int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean (batch, hidden) of the positions of padded texts where a mask is 1; zero where there is none."""
    total = torch.einsum("bth,bt->bh", hidden, mask.to(hidden.dtype))
    # Counted as integers: in bfloat16 a sum of ones stops at 256.
    return total / mask.sum(1, keepdim=True).clamp(min=1).to(hidden.dtype)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    """As `_mean`, the maximum."""
    inside = mask.bool()[..., None]
    most = torch.where(inside, hidden, torch.finfo(hidden.dtype).min).amax(1)
    return torch.where(inside.any(1), most, 0.0)


def _mean_and_max(hidden: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([_mean(hidden, mask), _max(hidden, mask)], dim=1)


def _mean_packed(hidden: Tensor, spans: Spans) -> Tensor:
    """Mean (num_texts, hidden) of packed texts, or of parts of them; zero where there is no token."""
    return F.embedding_bag(spans.places, hidden, spans.offsets[:-1], mode="mean")


def _mean_and_max_packed(hidden: Tensor, spans: Spans) -> Tensor:
    text = spans.texts[:, None].expand_as(hidden)
    most = hidden.new_full((len(spans.lengths), hidden.shape[1]), torch.finfo(hidden.dtype).min)
    most = most.scatter_reduce(0, text, hidden, "amax")
    most = torch.where((spans.lengths > 0)[:, None], most, 0.0)
    return torch.cat([_mean_packed(hidden, spans), most], dim=1)


def _padded(hidden: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """Packed texts padded with zeros, (num_texts, seq_len, hidden), and a mask of the tokens, (num_texts, seq_len)."""
    # Where no text has a token there is one column all the same: attention over none is undefined.
    offsets = spans.offsets
    column = torch.arange(max(spans.longest, 1), dtype=offsets.dtype, device=hidden.device)
    mask = column < spans.lengths[:, None]
    if not hidden.shape[0]:
        hidden = hidden.new_zeros(1, hidden.shape[1])
    # Gathered by position, for a boolean index would wait for the device to count.
    token = (offsets[:-1, None] + column).clamp_(max=hidden.shape[0] - 1)
    padded = hidden.index_select(0, token.flatten()).view(*mask.shape, -1)
    return torch.where(mask[..., None], padded, 0.0), mask


class PooledHead(nn.Module):
    """A head that makes one row of features of a text's tokens, and logits of these alone.

    What is learned is behind the features, so on an encoder that does not move they are computed once.
    """

    # Whether nothing but a text's first token is read: its last layer then needs no other row.
    reads_first_token_only: ClassVar[bool] = False
    # Features of a text, in widths of the encoder's hidden states.
    widths: ClassVar[int] = 1

    def __init__(self, config: HeadConfig, *, activation: str = "tanh", norm_eps: float | None = None) -> None:
        """Make a head with fresh weights.

        Args:
            config: Widths and labels.
            activation: Hugging Face's name of what stands between the two linear layers.
            norm_eps: Epsilon of a norm behind it, as ModernBERT's classifier has. None: no norm.
        """
        super().__init__()
        hidden = config.hidden_size
        self.dense = nn.Linear(self.widths * hidden, hidden)
        self.activation = ACT2FN[activation]
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out = nn.Linear(hidden, config.num_labels or 0)

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Features (batch, widths * hidden) of padded hidden states; arguments as `forward`."""
        raise NotImplementedError

    def pool_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """Features (num_texts, widths * hidden) of packed texts; arguments as `forward_packed`."""
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Logits (num_texts, num_labels) of features."""
        return self.out(self.dropout(self.norm(self.activation(self.dense(features)))))

    def forward(self, hidden: Tensor, attention_mask: Tensor, firsts: Tensor | None = None) -> Tensor:
        """Map padded hidden states to logits (num_texts, num_labels).

        Args:
            hidden: Hidden states, (batch, seq_len, hidden).
            attention_mask: 1 for tokens, 0 for padding, (batch, seq_len).
            firsts: Tokens of the first text of each pair, (batch,), as `first_lengths` counts; the others are of the
                second. None: no text has a second one. Read by heads that tell the two apart.
        """
        return self.classify(self.pool(hidden, attention_mask))

    def forward_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """Map packed texts to logits (num_texts, num_labels), without a wait for the device.

        Args:
            hidden: Hidden states of the texts' tokens, one text after another, (num_tokens, hidden).
            spans: Where they lie.
        """
        return self.classify(self.pool_packed(hidden, spans))


class ClsHead(PooledHead):
    """First token -> linear + tanh -> linear: Hugging Face's pooler and classifier; exit k is then a plain model."""

    reads_first_token_only: ClassVar[bool] = True

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """The first token's hidden state."""
        return first_token(hidden, attention_mask)

    def pool_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """The first token's hidden state."""
        if not hidden.shape[0]:
            return hidden.new_zeros(len(spans.lengths), hidden.shape[1])
        first = hidden.index_select(0, spans.offsets[:-1].clamp(max=hidden.shape[0] - 1))
        # A text without tokens has no first one; it must not borrow its neighbour's.
        return torch.where((spans.lengths > 0)[:, None], first, 0.0)


class MeanHead(PooledHead):
    """Masked mean of the tokens -> the same two linears; for sentence encoders, whose inner [CLS] carries little."""

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the tokens; zero where there is none."""
        return _mean(hidden, attention_mask)

    def pool_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """Mean of the tokens; zero where there is none."""
        return _mean_packed(hidden, spans)


class MeanMaxHead(MeanHead):
    """Mean and maximum of the tokens -> linear + tanh -> linear: a word that stands out is not averaged away."""

    widths: ClassVar[int] = 2

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean and maximum of the tokens, side by side; zero where there is none."""
        return _mean_and_max(hidden, attention_mask)

    def pool_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """Mean and maximum of the tokens, side by side; zero where there is none."""
        return _mean_and_max_packed(hidden, spans)


class ConvHead(nn.Module):
    """Each token narrowed, a convolution over its neighbours, mean and maximum -> linear + tanh -> linear (Kim 2014).

    It sees phrases, which a mean of hidden states has lost, and what it learns stands before the pooling. Where the
    config names a separator, the two texts of a pair are pooled apart and compared; the second of a single text is
    empty, and its features zero.
    """

    channels: ClassVar[int] = 64
    width: ClassVar[int] = 5
    reads_first_token_only: ClassVar[bool] = False

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        size = self.channels
        self.tells_texts_apart = config.separator_id is not None
        self.narrow = nn.Linear(config.hidden_size, size)
        self.convolution = nn.Linear(self.width * size, size)
        self.dense = nn.Linear((8 if self.tells_texts_apart else 2) * size, 4 * size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out = nn.Linear(4 * size, config.num_labels or 0)

    def forward(self, hidden: Tensor, attention_mask: Tensor, firsts: Tensor | None = None) -> Tensor:
        """Map padded hidden states to logits; arguments as `PooledHead.forward`."""
        mask = attention_mask.bool()
        tokens = torch.where(mask[..., None], F.gelu(self.narrow(hidden)), 0.0)
        reach, seq_len = self.width // 2, tokens.shape[1]
        near = F.pad(tokens, (0, 0, reach, reach))
        near = torch.cat([near[:, step : step + seq_len] for step in range(self.width)], dim=-1)
        tokens = self._convolved(tokens, near)
        if not self.tells_texts_apart:
            return self._answer(_mean_and_max(tokens, mask))
        place = mask.cumsum(1)  # from 1, wherever the padding is
        border = place[:, -1:] if firsts is None else firsts[:, None]
        parts = (mask & (place <= border), mask & (place > border))
        return self._answer(compared(*(_mean_and_max(tokens, part) for part in parts)))

    def forward_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """Map packed texts to logits; arguments as `PooledHead.forward_packed`."""
        tokens = F.gelu(self.narrow(hidden))
        with_none = torch.cat([tokens, tokens.new_zeros(1, self.channels)])
        near = with_none.index_select(0, spans.neighbours(self.width // 2)).view(
            len(tokens), self.width * self.channels
        )
        tokens = self._convolved(tokens, near)
        if not self.tells_texts_apart:
            return self._answer(_mean_and_max_packed(tokens, spans))
        parts = _mean_and_max_packed(tokens, spans.parts)
        return self._answer(compared(parts[::2], parts[1::2]))

    def _convolved(self, tokens: Tensor, near: Tensor) -> Tensor:
        """Tokens (…, channels) with what their neighbours, side by side (…, width * channels), have to say."""
        return tokens + F.gelu(F.linear(near, self.by_neighbour(), self.convolution.bias))

    def by_neighbour(self) -> Tensor:
        """Weight of the convolution for neighbours side by side, (channels, width * channels)."""
        # Columns stand as those of a Conv1d, channel by channel; side by side the neighbours are copied faster.
        return self.convolution.weight.view(self.channels, self.channels, self.width).transpose(1, 2).flatten(1)

    def _answer(self, features: Tensor) -> Tensor:
        """Logits of features (num_texts, 2 * channels), of pairs those of `compared`."""
        return self.out(self.dropout(torch.tanh(self.dense(features))))


def compared(one: Tensor, other: Tensor) -> Tensor:
    """What tells the two texts of each pair apart: (num_pairs, width) of either to (num_pairs, 4 width)."""
    return torch.cat([one, other, (one - other).abs(), one * other], dim=1)


class Features(nn.Module):
    """What a head reads, in the place of its logits: what a backend gives where a head is to be fitted later.

    Of a head that pools its features, one row for each text; of any other the hidden states, one for each token.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    @property
    def is_by_text(self) -> bool:
        """Whether there is one row for each text, or one for each token."""
        return isinstance(self.head, PooledHead)

    def forward(self, hidden: Tensor, attention_mask: Tensor, firsts: Tensor | None = None) -> Tensor:
        """Rows of padded texts, one text after another; arguments as `PooledHead.forward`."""
        if isinstance(self.head, PooledHead):
            return self.head.pool(hidden, attention_mask)
        return hidden[attention_mask.bool()]

    def forward_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """Rows of packed texts; arguments as `PooledHead.forward_packed`."""
        return self.head.pool_packed(hidden, spans) if isinstance(self.head, PooledHead) else hidden


class AttentionHead(nn.Module):
    """FastBERT's classifier (Liu et al., ACL 2020): linear to 128 + tanh, self-attention with two heads over the text's
    own tokens, first token, linear + tanh, linear. Padding is masked; the authors' public GEEP code leaves that out.
    """  # noqa: D205

    num_heads: ClassVar[int] = 2
    reads_first_token_only: ClassVar[bool] = False

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        size = config.exit_hidden_size
        self.narrow = nn.Linear(config.hidden_size, size)
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(size, 2 * size)
        self.attention_out = nn.Linear(size, size)
        self.dense = nn.Linear(size, size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out = nn.Linear(size, config.num_labels or 0)

    def forward(self, hidden: Tensor, attention_mask: Tensor, firsts: Tensor | None = None) -> Tensor:
        """Map padded hidden states (batch, seq_len, hidden) and a 0/1 mask (batch, seq_len) to logits."""
        return self._answer(torch.tanh(self.narrow(hidden)), attention_mask)

    def forward_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """Map packed texts to logits; arguments as `PooledHead.forward_packed`."""
        # Narrowed before it is padded: of short texts most of what is padded is padding.
        return self._answer(*_padded(torch.tanh(self.narrow(hidden)), spans))

    def _answer(self, narrow: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of narrowed tokens, padded with anything, (batch, seq_len, size)."""
        batch, seq_len, size = narrow.shape
        # Only the first token's output is read, so it is the only query.
        first = first_token(narrow, attention_mask)
        query = self.query(first).view(batch, 1, self.num_heads, -1).transpose(1, 2)
        key_value = self.key_value(narrow).view(batch, seq_len, 2, self.num_heads, -1)
        key, value = key_value.permute(2, 0, 3, 1, 4)
        keep = attention_mask.bool()[:, None, None, :]
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout)
        answer = self.attention_out(mixed.transpose(1, 2).reshape(batch, size))
        return self.out(self.dropout(torch.tanh(self.dense(answer))))


def standardise_input(head: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Fold "subtract the mean, divide by the deviation" of a head's input features into its first linear layer.

    Sentence encoders' features share one large direction and vary little around it; a fresh head on them learns for
    hundreds of steps before it tells texts apart. Folding costs nothing at run time and changes no shape
    (data-dependent initialisation, Krähenbühl et al. 2016).

    Args:
        head: A head of `HEADS`; changed in place.
        mean: Mean of the features that its first linear layer reads, (hidden,).
        std: Their standard deviation, positive, (hidden,).
    """
    linear = first_linear(head)
    with torch.no_grad():
        linear.weight.div_(std)
        linear.bias.sub_(linear.weight @ mean)


def first_linear(head: nn.Module) -> nn.Linear:
    """The linear layer through which a head reads the encoder's features."""
    return next(module for module in head.modules() if isinstance(module, nn.Linear))


HEADS: dict[str, type[nn.Module]] = {
    "attention": AttentionHead,
    "cls": ClsHead,
    "conv": ConvHead,
    "mean": MeanHead,
    "mean+max": MeanMaxHead,
}
