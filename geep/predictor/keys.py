"""Token ids and n-grams of a text as rows of a table. What the rows hold is not known here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from geep.hash_table import HashTable

TOKEN_BITS = 18


ORDER_SHIFT = 3 * TOKEN_BITS


SHARED_SHIFT = ORDER_SHIFT + 2
"""Bit of what both texts of a pair have, and of the counted keys, whose order is 0."""


NUM_BUCKETS = 16
"""Buckets of each counted key."""


NUM_COUNTED = 5
"""Counted keys of a pair."""


_MAX_NGRAM_ORDER = 3


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys a table knows, and the row of each.

    Rows 0 … vocab_size - 1 are the unigrams, row = token id. Then come the n-grams, row = vocab_size + value in the
    hash table. The last row is neutral: special tokens and unknown n-grams get it, its numbers are all zero, and it
    does not count as a key of the text. An n-gram never reaches across a text's border and holds no special token.

    With a `separator_id` texts are read as pairs: the second text begins at the first separator, also at one that was
    written in the first text. Then keys tell what both texts have from what one of them has:

    - What one text has and the other has not is a key wherever it stands, the same one for either text.
    - What both have, unigrams too, is another key, and counts where it stands in the first text.
    - If both texts have tokens, `NUM_COUNTED` keys are buckets of counts: of each text's tokens, the number that the
      other has not and the share that it has; of the shared tokens of both, the share at which a shared bigram begins.

    So a text without a second one has the keys that it has without a separator.

    Args:
        vocab_size: Number of token ids.
        special_ids: Ids that the tokenizer adds or that say nothing, such as [CLS], [SEP], [PAD] and [UNK].
        ngram_order: Longest n-gram, 1 to 3; 1 means token ids only.
        ngrams: Packed n-grams and other keys that need it to 0 … number of them - 1.
        separator_id: The special id that ends the first text of a pair; `None` reads each text as one.

    Raises:
        ValueError: If a number is out of range, or the ids are too large to be packed.
    """

    vocab_size: int
    special_ids: tuple[int, ...]
    ngram_order: int
    ngrams: HashTable
    separator_id: int | None = None

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}; give the tokenizer's length.")
        if not 1 <= self.ngram_order <= _MAX_NGRAM_ORDER:
            raise ValueError(f"ngram_order must be within 1..{_MAX_NGRAM_ORDER}, got {self.ngram_order}; 2 is usual.")
        if (self.ngram_order > 1 or self.separator_id is not None) and self.vocab_size > 1 << TOKEN_BITS:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, n-grams are packed with {TOKEN_BITS} bits a token and need at most "
                f"{1 << TOKEN_BITS}; use ngram_order=1 and no separator_id with this tokenizer."
            )
        outside = [token for token in self.special_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(
                f"special_ids must be within 0..{self.vocab_size - 1}, got {outside}; "
                "raise vocab_size to the tokenizer's full length, added tokens included."
            )
        if self.separator_id is not None and self.separator_id not in self.special_ids:
            raise ValueError(
                f"separator_id must be one of special_ids, got {self.separator_id} and {self.special_ids}; give the "
                "tokenizer's sep_token_id, or None for single texts."
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

        Each token gives `ngram_order` rows: its own and those of the n-grams that begin at it; a text gives
        `NUM_COUNTED` more if it is read as a pair. So the shapes follow from the input's alone, and a text's rows do
        not depend on its neighbours.

        Args:
            input_ids: Token ids of the texts one after another, int64, shape (num_tokens,).
            lengths: Tokens of each text, int64, shape (num_texts,); 0 is allowed.

        Returns:
            Rows, int64, shape (num_tokens * ngram_order,) or, with a separator, (num_tokens * ngram_order +
            num_texts * NUM_COUNTED,), and offsets, int64, shape (num_texts,).

        Raises:
            TypeError: If a tensor is not int64.
            ValueError: If the shapes do not fit together or an id is not in the vocabulary.
        """
        keys = self.pack(input_ids, lengths)
        rows = torch.full((keys.num_places,), self.neutral_row, device=input_ids.device)
        rows[keys.direct_places] = torch.where(keys.direct >= 0, keys.direct, self.neutral_row)
        found = self.ngrams.find(keys.packed)
        rows[keys.places] = torch.where(found >= 0, found + self.vocab_size, self.neutral_row)
        return rows, keys.offsets

    def shared_values(self) -> Tensor:
        """Value in the hash table of each token as what both texts of a pair have, int64, (vocab_size,); -1: none."""
        tokens = torch.arange(self.vocab_size, device=self.ngrams.device)
        return self.ngrams.find(tokens | (1 << ORDER_SHIFT) | (1 << SHARED_SHIFT))

    def pack(self, input_ids: Tensor, lengths: Tensor) -> PackedKeys:
        """Return the texts' keys as they are before any is looked up; arguments and errors are those of `rows_of`."""
        check_texts(input_ids, lengths, self.vocab_size)
        usable = is_usable(input_ids, self.special_ids)
        text = text_of(lengths, input_ids.numel())
        windows = _windows(input_ids, text, usable, self.ngram_order)
        if self.separator_id is None:
            order, none = self.ngram_order, input_ids[:0]
            return PackedKeys(
                offsets=(lengths.cumsum(0) - lengths) * order,
                num_places=input_ids.numel() * order,
                direct_places=torch.arange(input_ids.numel(), device=input_ids.device) * order,
                direct=torch.where(usable, input_ids, -1),
                places=torch.cat([none, *(each.starts * order + each.size - 1 for each in windows)]),
                packed=torch.cat([none, *(each.packed | (each.size << ORDER_SHIFT) for each in windows)]),
            )
        return _pack_pairs(input_ids, lengths, text, usable, windows, self.separator_id)


@dataclass(frozen=True, eq=False)
class PackedKeys:
    """The keys of texts, those that need it packed into 64 bits, and the place of each among the texts' rows.

    Args:
        offsets: Place at which each text begins, int64, shape (num_texts,).
        num_places: Places of all texts together.
        direct_places: Place of each token, int64, shape (num_tokens,).
        direct: The token's id where that is its row, else -1, int64, shape (num_tokens,).
        places: Place of each packed key, int64, shape (num_packed,).
        packed: 18 bits a token below 2 bits of order: n-grams of different sizes never share a number, whatever their
            ids. Above them a bit for what both texts of a pair have; of order 0 are its counted keys.
    """

    offsets: Tensor
    num_places: int
    direct_places: Tensor
    direct: Tensor
    places: Tensor
    packed: Tensor


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


def text_of_rows(offsets: Tensor, total: int) -> Tensor:
    """Return the text that each of `total` rows belongs to, where texts begin at `offsets`."""
    return text_of(torch.diff(offsets, append=offsets.new_tensor([total])), total)


@dataclass(frozen=True, eq=False)
class _Windows:
    """The n-grams of one size: where they begin, increasing, and what their ids are packed to, without the size."""

    size: int
    starts: Tensor
    packed: Tensor


def _windows(input_ids: Tensor, text: Tensor, usable: Tensor, order: int) -> list[_Windows]:
    """Return the n-grams of each size 2 … order."""
    packed, inside, found = input_ids, usable, []
    for size in range(2, order + 1):
        last = size - 1
        packed = (packed[:-1] << TOKEN_BITS) | input_ids[last:]
        inside = inside[:-1] & usable[last:] & (text[:-last] == text[last:])
        starts = torch.nonzero(inside)[:, 0]
        found.append(_Windows(size, starts, packed[starts]))
    return found


def _pack_pairs(
    input_ids: Tensor, lengths: Tensor, text: Tensor, usable: Tensor, windows: list[_Windows], separator_id: int
) -> PackedKeys:
    """Pack the keys of pairs; see `Keys`."""
    order, num_texts = len(windows) + 1, lengths.numel()
    starts = torch.nonzero(usable)[:, 0]
    windows = [_Windows(1, starts, input_ids[starts]), *windows]
    begins = lengths.cumsum(0) - lengths
    separators = F.pad((input_ids == separator_id).cumsum(0), (1, 0))
    is_second = separators[1:] > separators[begins][text]
    shared = _shared(input_ids, text, windows, is_second)

    places = torch.arange(input_ids.numel(), device=input_ids.device) * order + text * NUM_COUNTED
    offsets = begins * order + torch.arange(num_texts, device=lengths.device) * NUM_COUNTED
    direct = torch.full_like(input_ids, -1)
    direct[starts] = torch.where(shared[0], -1, input_ids[starts])
    found_places, found = [], []
    for each, both in zip(windows, shared, strict=True):
        kept = ~(both & is_second[each.starts])
        if each.size == 1:
            kept &= both  # the others are direct
        found_places.append(places[each.starts[kept]] + each.size - 1)
        found.append((each.packed | (each.size << ORDER_SHIFT) | (both.long() << SHARED_SHIFT))[kept])

    side = text * 2 + is_second
    tokens, common = (
        torch.bincount(side[each], minlength=2 * num_texts).view(-1, 2) for each in (starts, starts[shared[0]])
    )
    bigrams = torch.zeros_like(lengths)
    if order > 1:
        bigrams = torch.bincount(text[windows[1].starts[shared[1]]], minlength=num_texts)
    buckets = [(tokens - common).clamp(max=NUM_BUCKETS - 1), _share(common, tokens)]
    counted = torch.cat([*buckets, _share(bigrams, common.sum(1))[:, None]], 1)
    kinds = torch.arange(NUM_COUNTED, device=lengths.device)
    counted += (1 << SHARED_SHIFT) | (kinds * NUM_BUCKETS)
    is_pair = (tokens > 0).all(1)
    found_places.append(((offsets + lengths * order)[:, None] + kinds)[is_pair].flatten())
    found.append(counted[is_pair].flatten())
    num_places = input_ids.numel() * order + num_texts * NUM_COUNTED
    return PackedKeys(offsets, num_places, places, direct, torch.cat(found_places), torch.cat(found))


def _shared(input_ids: Tensor, text: Tensor, windows: list[_Windows], is_second: Tensor) -> list[Tensor]:
    """Tell for each size, from 1 on, which n-grams stand in both texts of their pair."""
    # Equal n-grams of a pair get one number: that of their beginning, which is shorter by one, beside their last id.
    number, found = text, []
    for each in windows:
        longer = (number[each.starts] << TOKEN_BITS) | input_ids[each.starts + each.size - 1]
        distinct, place = longer.unique(return_inverse=True)
        stands = torch.zeros(distinct.numel(), 2, dtype=torch.bool, device=input_ids.device)
        stands[place, is_second[each.starts].long()] = True
        found.append(stands.all(1)[place])
        number = torch.empty_like(input_ids)
        number[each.starts] = place
    return found


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Bucket of part / whole in integers, which are the same on every device; the bucket of nothing is 0."""
    return (part * NUM_BUCKETS // whole.clamp(min=1)).clamp(max=NUM_BUCKETS - 1)


def with_key_weight(keys: Keys, rows: Tensor) -> Tensor:
    """Put a column before `rows` that is 1 for every key and 0 for the neutral row: its sum counts a text's keys."""
    weight = rows.new_ones(keys.num_rows, 1)
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
