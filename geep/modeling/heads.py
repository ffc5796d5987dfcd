"""Classifiers: hidden states of texts to logits. Where a head sits is not known here."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadConfig(Protocol):
    """What a head reads of a model's config."""

    @property
    def hidden_size(self) -> int:
        """Width of the encoder's hidden states."""

    exit_hidden_size: int
    classifier_dropout: float | int

    @property
    def num_labels(self) -> int | None:
        """Logits to give."""


def first_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden state (batch, hidden) of each text's first token: at the left, unless the padding is there."""
    place = attention_mask.int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


class ClsHead(nn.Module):
    """First token -> linear + tanh -> linear: Hugging Face's pooler and classifier; exit k is then a plain model."""

    # Whether nothing but a text's first token is read: its last layer then needs no other row.
    reads_first_token_only: ClassVar[bool] = True

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.dense = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out = nn.Linear(hidden, config.num_labels or 0)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Map padded hidden states (batch, seq_len, hidden) and a 0/1 mask (batch, seq_len) to logits."""
        return self._classify(first_token(hidden, attention_mask))

    def forward_packed(self, hidden: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """Map packed texts to logits (num_texts, num_labels), without a wait for the device.

        Args:
            hidden: Hidden states of the texts' tokens, one text after another, (num_tokens, hidden).
            offsets: Where each text begins, and the end of the last: from 0 to num_tokens, (num_texts + 1,).
            longest: Tokens of the longest text.
        """
        if not hidden.shape[0]:
            return self._classify(hidden.new_zeros(offsets.shape[0] - 1, hidden.shape[1]))
        first = hidden.index_select(0, offsets[:-1].clamp(max=hidden.shape[0] - 1))
        # A text without tokens has no first one; it must not borrow its neighbour's.
        return self._classify(torch.where((offsets.diff() > 0)[:, None], first, 0.0))

    def _classify(self, pooled: Tensor) -> Tensor:
        return self.out(self.dropout(torch.tanh(self.dense(pooled))))


class MeanHead(ClsHead):
    """Masked mean of the tokens -> the same two linears; for sentence encoders, whose inner [CLS] carries little."""

    reads_first_token_only: ClassVar[bool] = False

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Map padded hidden states (batch, seq_len, hidden) and a 0/1 mask (batch, seq_len) to logits."""
        mask = attention_mask.to(hidden.dtype)
        total = torch.einsum("bth,bt->bh", hidden, mask)
        # Counted as integers: in bfloat16 a sum of ones stops at 256.
        counts = attention_mask.sum(1, keepdim=True).clamp(min=1)
        return self._classify(total / counts.to(hidden.dtype))

    def forward_packed(self, hidden: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """Map packed texts to logits; arguments as `ClsHead.forward_packed`."""
        tokens = torch.arange(hidden.shape[0], dtype=offsets.dtype, device=hidden.device)
        return self._classify(F.embedding_bag(tokens, hidden, offsets[:-1], mode="mean"))


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

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Map padded hidden states (batch, seq_len, hidden) and a 0/1 mask (batch, seq_len) to logits."""
        narrow = torch.tanh(self.narrow(hidden))  # (batch, seq_len, size)
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

    def forward_packed(self, hidden: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """Map packed texts to logits; arguments as `ClsHead.forward_packed`."""
        # Where no text has a token there is one column all the same: attention over none is undefined.
        column = torch.arange(max(longest, 1), dtype=offsets.dtype, device=hidden.device)
        mask = column < offsets.diff()[:, None]
        if not hidden.shape[0]:
            hidden = hidden.new_zeros(1, hidden.shape[1])
        # Gathered by position, for a boolean index would wait for the device to count.
        token = (offsets[:-1, None] + column).clamp_(max=hidden.shape[0] - 1)
        padded = hidden.index_select(0, token.flatten()).view(*mask.shape, -1)
        return self(torch.where(mask[..., None], padded, 0.0), mask)


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


HEADS: dict[str, type[nn.Module]] = {"attention": AttentionHead, "cls": ClsHead, "mean": MeanHead}
