"""What an encoder can be given: positions, token ids and segments that it has rows for."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from geep.modeling.families import family_of


def first_lengths(input_ids: Tensor, attention_mask: Tensor, separator_id: int) -> Tensor:
    """Tokens of the first text of each padded pair, (batch,): up to its first separator, which belongs to it.

    The second text is what follows. Where nothing does, the text is a single one. Told by the ids alone, so that it is
    the same for encoders with and without segments; a separator that someone typed ends the first text, too.

    Args:
        input_ids: Token ids, (batch, seq_len).
        attention_mask: 1 for tokens, 0 for padding on either side, (batch, seq_len).
        separator_id: The id that the tokenizer puts behind a text.
    """
    mask = attention_mask.bool()
    is_separator = ((input_ids == separator_id) & mask).int()
    return (mask & (is_separator.cumsum(1) == is_separator)).sum(1)


def first_lengths_packed(input_ids: Tensor, lengths: Tensor, separator_id: int) -> Tensor:
    """As `first_lengths`, of texts without padding, one after another.

    Args:
        input_ids: Token ids, (num_tokens,).
        lengths: Tokens of each text, (num_texts,).
        separator_id: The id that the tokenizer puts behind a text.
    """
    ends = lengths.cumsum(0)
    before = F.pad((input_ids == separator_id).cumsum(0), (1, 0))  # separators before each token
    at_start = before[ends - lengths].repeat_interleave(lengths, output_size=input_ids.numel())
    is_first = F.pad((before[:-1] == at_start).cumsum(0), (1, 0))
    return is_first[ends] - is_first[ends - lengths]


def longest_input(encoder: PreTrainedModel) -> int:
    """Tokens of the longest text that an encoder has positions for.

    Raises:
        ValueError: If the encoder counts positions from its pad token and has none.
    """
    positions = int(encoder.config.max_position_embeddings)
    if not family_of(encoder.config).positions_after_pad:
        return positions
    embeddings: Any = encoder.embeddings
    pad: int | None = embeddings.padding_idx  # of MPNet always 1, whatever its config says
    if pad is None:
        raise ValueError(
            f"Encoder {encoder.config.model_type!r} counts positions from its pad token, and its config.json has none; "
            "set pad_token_id to that of the tokenizer."
        )
    return positions - pad - 1


def made_up_inputs(encoder: PreTrainedModel, longest: int, lengths: tuple[int, ...] = (6, 2, 4)) -> dict[str, Tensor]:
    """A padded batch on which two ways of running an encoder can be compared: short texts that mean nothing.

    Args:
        encoder: An encoder of one of `FAMILIES`.
        longest: Tokens of the longest text that may be given.
        lengths: Tokens of each text, where no more than `longest`. Of several lengths, so that padding would show.

    Returns:
        `input_ids`, `attention_mask` and, where the encoder has several segments, `token_type_ids`: int64, on the CPU,
        (num_texts, seq_len), padded at the right.
    """
    config = encoder.config
    counts = torch.tensor(lengths).clamp(max=longest)
    place = torch.arange(int(counts.max()))
    mask = place < counts[:, None]
    ids = torch.randint(0, config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": torch.where(mask, ids, config.pad_token_id or 0), "attention_mask": mask.long()}
    if family_of(config).has_token_type_ids and config.type_vocab_size > 1:
        given["token_type_ids"] = ((place * 2 >= counts[:, None]) & mask).long()
    return given


def check_tokenizer(encoder: PreTrainedModel, tokenizer: Any, *, pairs: bool | None) -> None:
    """Refuse a tokenizer whose ids the encoder has no rows for; the tokenizer keeps its state.

    Args:
        encoder: An encoder of one of `FAMILIES`.
        tokenizer: A tokenizer of Hugging Face.
        pairs: Whether pairs of texts are to be read; None: not known, and not checked.

    Raises:
        ValueError: If there is no pad token; or a token, the padding or, of pairs, a segment has no row.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "The tokenizer has no pad token, expected one that fills texts of a batch up to one length; use the "
            "tokenizer that the encoder was trained with, or set its pad_token."
        )
    config = encoder.config
    rows = len(cast(nn.Embedding, encoder.get_input_embeddings()).weight)
    single, pair = (_read(tokenizer, *texts) for texts in (("",), ("", "")))
    # The ids around texts come from a template, which need not agree with the vocabulary.
    highest = max([*tokenizer.get_vocab().values(), *single[0], *pair[0]], default=-1)
    if highest >= rows:
        raise ValueError(
            f"The tokenizer has token ids up to {highest}, the encoder has embeddings for 0..{rows - 1}. Use the "
            "tokenizer that the model was trained with; added tokens need resize_token_embeddings before training."
        )
    pad = config.pad_token_id
    if pad is not None and not 0 <= pad < rows:
        raise ValueError(
            f"pad_token_id of the encoder's config is {pad}, and there are embeddings for 0..{rows - 1}; set it to "
            "that of the tokenizer."
        )
    if not family_of(config).has_token_type_ids or config.model_type == "deberta-v2":
        return  # DeBERTa gives tokens no segment where it has no rows
    segments = config.type_vocab_size
    if segments < 1:
        raise ValueError(
            f"type_vocab_size of the encoder's config is {segments}, expected 1 or more: a {config.model_type} encoder "
            "gives each token a segment."
        )
    if pairs and "token_type_ids" in tokenizer.model_input_names and max(pair[1], default=0) >= segments:
        raise ValueError(
            f"The tokenizer gives pairs segment ids up to {max(pair[1])}, the encoder has rows for 0..{segments - 1}; "
            "take 'token_type_ids' out of the tokenizer's model_input_names."
        )


def _read(tokenizer: Any, *texts: str) -> tuple[list[int], list[int]]:
    """Token ids and segment ids of a text or pair."""
    if tokenizer.is_fast:
        row = tokenizer.backend_tokenizer.encode(*texts)
        return row.ids, row.type_ids
    # In lists, for a single empty second text would count as none.
    found = tokenizer(*([text] for text in texts), return_token_type_ids=True, verbose=False)
    return found["input_ids"][0], found["token_type_ids"][0]
