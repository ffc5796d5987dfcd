"""Token ids and n-grams of a text as rows of a table. What the rows hold is not known here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geep.hash_table import HashTable

TOKEN_BITS = 18


ORDER_SHIFT = 3 * TOKEN_BITS


_MAX_NGRAM_ORDER = 3


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys a table knows, and the row of each.

    Rows 0 … vocab_size - 1 are the unigrams, row = token id. Then come the n-grams, row = vocab_size + value in the
    hash table. The last row is neutral: special tokens and unknown n-grams get it, its numbers are all zero, and it
    does not count as a key of the text. An n-gram never reaches across a text's border and holds no special token.

    Args:
        vocab_size: Number of token ids.
        special_ids: Ids that the tokenizer adds or that say nothing, such as [CLS], [SEP], [PAD] and [UNK].
        ngram_order: Longest n-gram, 1 to 3; 1 means token ids only.
        ngrams: N-grams packed into 64 bits to 0 … number of n-grams - 1.

    Raises:
        ValueError: If a number is out of range, or the ids are too large to be packed.
    """

    vocab_size: int
    special_ids: tuple[int, ...]
    ngram_order: int
    ngrams: HashTable

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}; give the tokenizer's length.")
        if not 1 <= self.ngram_order <= _MAX_NGRAM_ORDER:
            raise ValueError(f"ngram_order must be within 1..{_MAX_NGRAM_ORDER}, got {self.ngram_order}; 2 is usual.")
        if self.ngram_order > 1 and self.vocab_size > 1 << TOKEN_BITS:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, n-grams are packed with {TOKEN_BITS} bits a token and need at most "
                f"{1 << TOKEN_BITS}; use ngram_order=1 with this tokenizer."
            )
        outside = [token for token in self.special_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(
                f"special_ids must be within 0..{self.vocab_size - 1}, got {outside}; "
                "raise vocab_size to the tokenizer's full length, added tokens included."
            )

    @property
    def num_rows(self) -> int:
        """Unigrams, n-grams and the neutral row."""
        return self.vocab_size + len(self.ngrams) + 1

    @property
    def neutral_row(self) -> int:
        """The row of everything that is no key: the last one."""
        return self.num_rows - 1

    def rows_of(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the texts' keys and where each text begins in them, as `embedding_bag` takes them.

        Each token gives `ngram_order` rows: its own and those of the n-grams that begin at it. So the shapes follow
        from the input's alone, and a text's rows do not depend on its neighbours.

        Args:
            input_ids: Token ids of the texts one after another, int64, shape (num_tokens,).
            lengths: Tokens of each text, int64, shape (num_texts,); 0 is allowed.

        Returns:
            Rows, int64, shape (num_tokens * ngram_order,), and offsets, int64, shape (num_texts,).

        Raises:
            TypeError: If a tensor is not int64.
            ValueError: If the shapes do not fit together or an id is not in the vocabulary.
        """
        check_texts(input_ids, lengths, self.vocab_size)
        usable = is_usable(input_ids, self.special_ids)
        rows = torch.full((input_ids.numel(), self.ngram_order), self.neutral_row, device=input_ids.device)
        rows[:, 0] = torch.where(usable, input_ids, self.neutral_row)
        for column, (starts, packed) in enumerate(packed_ngrams(input_ids, lengths, usable, self.ngram_order), start=1):
            found = self.ngrams.find(packed)
            rows[starts, column] = torch.where(found >= 0, found + self.vocab_size, self.neutral_row)
        return rows.flatten(), (lengths.cumsum(0) - lengths) * self.ngram_order


def text_hashes(input_ids: Tensor, lengths: Tensor) -> Tensor:
    """64-bit hash of each text's token ids, in their order, int64, (num_texts,): texts are told apart by it alone.

    Texts that differ share one by chance with a probability of about 2**-64 for each two.
    """
    text = text_of(lengths, input_ids.numel())
    place = torch.arange(input_ids.numel(), device=input_ids.device) - (lengths.cumsum(0) - lengths)[text]
    # Multiplications wrap around; the constants are odd, those of SplitMix64 (Steele et al. 2014) in two's complement.
    mixed = (input_ids + 1) * -7046029254386353131 + (place + 1) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 30)) * -7723592293110705685
    mixed = mixed ^ (mixed >> 27)
    return torch.zeros_like(lengths).index_add_(0, text, mixed) ^ (lengths * -4265267296055464877)


def is_usable(input_ids: Tensor, special_ids: tuple[int, ...]) -> Tensor:
    """Which token ids may be part of a key, (num_tokens,)."""
    return torch.isin(input_ids, torch.tensor(special_ids, dtype=torch.int64, device=input_ids.device), invert=True)


def text_of(lengths: Tensor, total: int) -> Tensor:
    """Return the text that each of `total` entries belongs to."""
    texts = torch.arange(lengths.numel(), device=lengths.device)
    return texts.repeat_interleave(lengths, output_size=total)


def packed_ngrams(input_ids: Tensor, lengths: Tensor, usable: Tensor, order: int) -> list[tuple[Tensor, Tensor]]:
    """Return, for each size 2 … order, where n-grams begin and what they are packed to.

    18 bits a token below 2 bits of order: n-grams of different sizes never share a number, whatever their ids.
    """
    text = text_of(lengths, input_ids.numel())
    packed, inside, found = input_ids, usable, []
    for size in range(2, order + 1):
        last = size - 1
        packed = (packed[:-1] << TOKEN_BITS) | input_ids[last:]
        inside = inside[:-1] & usable[last:] & (text[:-last] == text[last:])
        starts = torch.nonzero(inside)[:, 0]
        found.append((starts, packed[starts] | (size << ORDER_SHIFT)))
    return found


def with_key_weight(keys: Keys, rows: Tensor) -> Tensor:
    """Put a column before `rows` that is 1 for every key and 0 for the neutral row: its sum counts a text's keys."""
    weight = torch.ones(keys.num_rows, 1, device=rows.device)
    weight[-1] = 0
    return torch.cat([weight, rows], 1)


def check_texts(input_ids: Tensor, lengths: Tensor, vocab_size: int) -> None:
    """Refuse packed texts whose types, shapes, lengths or ids do not fit together."""
    for name, tensor in (("input_ids", input_ids), ("lengths", lengths)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be torch.int64, got {tensor.dtype}; convert them with .long().")
        if tensor.ndim != 1:
            raise ValueError(f"{name} must be flat, got shape {tuple(tensor.shape)}; pack the texts without padding.")
    # One look at the numbers, for each makes the host wait for a GPU.
    zero = input_ids.new_zeros(1)
    ids, counts = (tensor if tensor.numel() else zero for tensor in (input_ids, lengths))
    shortest, total, smallest, largest = torch.stack([counts.min(), counts.sum(), ids.min(), ids.max()]).tolist()
    if shortest < 0 or total != input_ids.numel():
        raise ValueError(
            f"lengths must be >= 0 and sum to the number of tokens: found a sum of {total} for "
            f"{input_ids.numel()} tokens; give the number of tokens of each text, special ones included."
        )
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(
            f"input_ids must be within 0..{vocab_size - 1}, found {smallest}..{largest}; "
            "use the tokenizer that the table was built with."
        )
