"""Texts checked and tokenised, one part ahead of the run. Models are not known here.

Read `check_texts`, `TextEncoder`, `tokenized_ahead`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from geep.backends import TokenBatch

Integers = NDArray[np.int64]

TextInput = str | tuple[str, str]

# Texts tokenised at once by `predict`. Large enough that sorting finds texts alike, small enough to bound memory.
TEXTS_PER_CALL = 16_384
# Beside a GPU a part takes as long to tokenise as to run, and only what is another part is tokenised meanwhile.
PARTS_PER_CALL_BESIDE_GPU = 4

_KINDS = {False: "a single text", True: "a pair of texts"}
_EXPECTED = {
    False: "the model was trained on single texts: leave the second one out.",
    True: "the model was trained on pairs: give (text, second text) for each.",
}


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Token ids of texts and which texts were cut, (num_texts,)."""

    batch: TokenBatch
    truncated: NDArray[np.bool_]


def check_texts(texts: Sequence[TextInput], *, first: int = 0, pairs: bool | None = None) -> None:
    """Refuse what is no text and no pair of texts, and what the model has learned nothing of.

    Args:
        texts: The texts.
        first: Number of the first of them in the caller's list.
        pairs: Whether the model has learned pairs of texts, or single ones; None: not known, both are taken.

    Raises:
        TypeError: If an item is neither a string nor a pair of strings; the message names it.
        ValueError: If an item is a pair and the model has learned single texts, or the reverse; or if a text holds
            half a character (a lone surrogate); the message names it.
    """
    for index, text in enumerate(texts, start=first):
        parts = (text,) if isinstance(text, str) else text
        if parts is text and not (
            isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(part, str) for part in text)
        ):
            raise TypeError(f"Text {index} is {type(text).__name__}; expected a string or a pair of strings.")
        if pairs is not None and pairs == (parts is not text):
            raise ValueError(f"Text {index} is {_KINDS[not pairs]}; {_EXPECTED[pairs]}")
        if not all(part.isascii() or _is_unicode(part) for part in parts):
            raise ValueError(
                f"Text {index} holds half a character (a lone surrogate), expected Unicode; replace it, for example by "
                "text.encode('utf-8', 'replace').decode()."
            )


def in_parts(
    texts: Iterable[TextInput], pairs: bool | None = None, device_type: str = "cpu"
) -> Iterator[Sequence[TextInput]]:
    """Cut texts into parts, each checked as it comes: memory does not grow with their number.

    A sequence is checked whole before its first part, so that nothing is run for nothing.

    Args:
        texts: The texts.
        pairs: As for `check_texts`.
        device_type: Where they will run: parts have `TEXTS_PER_CALL` texts, on a GPU a quarter.

    Raises:
        TypeError, ValueError: As `check_texts`; also if `texts` is one string.
    """
    if isinstance(texts, str):
        raise TypeError("Expected a list of texts, got one string; write predict([text]).")
    size = TEXTS_PER_CALL // (PARTS_PER_CALL_BESIDE_GPU if device_type == "cuda" else 1)
    if isinstance(texts, Sequence):
        check_texts(texts, pairs=pairs)
        yield from (texts[start : start + size] for start in range(0, len(texts), size))
        return
    source, first = iter(texts), 0
    while part := list(islice(source, size)):
        check_texts(part, first=first, pairs=pairs)
        yield part
        first += len(part)


def tokenized_ahead(
    parts: Iterable[Sequence[TextInput]], work: Callable[[Sequence[TextInput]], TokenizedTexts]
) -> Iterator[TokenizedTexts]:
    """Tokenise each part while the one before it runs; the tokenizer's Rust threads leave Python's lock alone."""
    source = iter(parts)
    first = next(source, None)
    if first is None:
        return
    try:
        second = next(source, None)
    except Exception:
        # What was good before a bad text is answered before the caller is told of it.
        yield work(first)
        raise
    if second is None:
        # A thread takes longer to start than the few texts of a server's call to tokenise.
        yield work(first)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="geep-tokenize") as thread:
        waiting: Future[TokenizedTexts] = thread.submit(work, first)
        part: Sequence[TextInput] | None = second
        while part is not None:
            following = thread.submit(work, part)
            yield waiting.result()
            waiting = following
            try:
                part = next(source, None)
            except Exception:
                yield waiting.result()
                raise
        yield waiting.result()


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """Turns checked texts into token ids, with a tokenizer of its own: that of the caller is never touched.

    Tokenizers keep the length at which they cut as a state of theirs. Shared with other threads, which cut elsewhere,
    one would be set and then called with somebody else's length in between.

    Attributes:
        tokenizer: A tokenizer's Rust part, set to cut at `max_length`; a whole tokenizer if it is written in Python.
        max_length: Longest text in tokens.
        num_segments: Segment ids that the encoder has rows for; 0 where it gets none.
        single_has_segments: Whether single texts have other segment ids than 0.
    """

    tokenizer: Any
    max_length: int
    num_segments: int
    single_has_segments: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, max_length: int, num_segments: int) -> TextEncoder:
        """Copy a tokenizer; segment ids are given where its `model_input_names` list them, as Hugging Face does."""
        segments = num_segments if "token_type_ids" in tokenizer.model_input_names else 0
        if not tokenizer.is_fast:
            slow = copy.deepcopy(tokenizer)
            in_single = segments > 0 and any(_encode_slowly(slow, ["a"], max_length, with_types=True).type_ids[0])
            return cls(slow, max_length, segments, in_single)
        own: Any = copy.deepcopy(tokenizer.backend_tokenizer)
        own.no_padding()
        own.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
        # Whether "[SEP]" in a text is a token or five letters; Hugging Face says it anew at each call.
        own.encode_special_tokens = tokenizer.split_special_tokens
        return cls(own, max_length, segments, any(own.encode("a").type_ids))

    def __call__(self, texts: Sequence[TextInput]) -> TokenizedTexts:
        """Tokenise texts or pairs, cut at the longest length; memory grows with the number of texts.

        Raises:
            ValueError: If a text gets a segment id that the encoder has no row for.
        """
        with_types = self.num_segments > 0 and (
            self.single_has_segments or any(not isinstance(text, str) for text in texts)
        )
        encode = _encode if isinstance(self.tokenizer, Tokenizer) else _encode_slowly
        ids, types, lengths, truncated = [], [], [], []
        # In parts, for the tokenizer's own records take many times the memory of the ids.
        for start in range(0, max(len(texts), 1), TEXTS_PER_CALL):
            part = texts[start : start + TEXTS_PER_CALL]
            found = encode(self.tokenizer, part, self.max_length, with_types)
            lengths.append(np.fromiter(map(len, found.ids), dtype=np.int64, count=len(part)))
            ids.append(_flat(found.ids, lengths[-1]))
            truncated.append(found.truncated)
            if with_types:
                types.append(_flat(found.type_ids, lengths[-1]))
        segments = _joined(types) if types else None
        if segments is not None and segments.max(initial=0) >= self.num_segments:
            raise ValueError(
                f"The tokenizer gives segment ids up to {segments.max()}, the encoder has rows for "
                f"0..{self.num_segments - 1}; take 'token_type_ids' out of the tokenizer's model_input_names."
            )
        return TokenizedTexts(TokenBatch(_joined(ids), segments, _joined(lengths)), _joined(truncated))


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put parts behind one another; a single one is no copy."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Token ids and segment ids of each text, and which were cut."""

    ids: Sequence[Sequence[int]]
    type_ids: Sequence[Sequence[int]]
    truncated: NDArray[np.bool_]


def _encode(tokenizer: Any, texts: Sequence[TextInput], max_length: int, with_types: bool) -> _Encoded:
    """Tokenise in Rust, texts and pairs together, and no more than is asked for: no offsets, masks or words."""
    rows = tokenizer.encode_batch_fast(list(texts))
    # Built as lists at once: each look at an encoding's ids makes a new list.
    ids = [row.ids for row in rows]
    cut = (len(row) >= max_length and bool(row.overflowing) for row in rows)
    types = [row.type_ids for row in rows] if with_types else []
    return _Encoded(ids, types, np.fromiter(cut, dtype=bool, count=len(rows)))


def _encode_slowly(tokenizer: Any, texts: Sequence[TextInput], max_length: int, with_types: bool) -> _Encoded:
    """Tokenise with a tokenizer that is written in Python: a text at a time, as it would itself."""

    def encode(text: TextInput, **options: Any) -> tuple[list[int], list[int]]:
        # In lists, for a single empty second text would count as none.
        parts = [[part] for part in ((text,) if isinstance(text, str) else text)]
        row = tokenizer(*parts, return_token_type_ids=with_types, verbose=False, **options)
        return row["input_ids"][0], row["token_type_ids"][0] if with_types else []

    rows = [encode(text) for text in texts]
    cut = np.fromiter((len(ids) > max_length for ids, _ in rows), dtype=bool, count=len(rows))
    for number in np.flatnonzero(cut).tolist():
        rows[number] = encode(texts[number], truncation=True, max_length=max_length)
    return _Encoded([ids for ids, _ in rows], [types for _, types in rows], cut)


def _flat(rows: Sequence[Sequence[int]], lengths: Integers) -> Integers:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
