"""What is refused before anything runs: models and tokenizers that do not belong together, or that are damaged.

Read `check_model`, `longest_text`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from geep.modeling import GeepForSequenceClassification, check_tokenizer, label_names_of, longest_input


def check_model(model: GeepForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse weights, labels and token ids that do not belong together.

    Raises:
        ValueError: If weights hold NaN or infinity; or the classifiers have another number of labels than the config
            names; or as `check_tokenizer`.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"Weight {name!r} holds NaN or infinity, expected finite numbers; train or copy it again.")
    num_labels = len(label_names_of(model.config))
    for layer in model.config.depths:
        found = len(cast(Any, model.head_at(layer)).out.weight)
        if found != num_labels:
            raise ValueError(
                f"The classifier at layer {layer} gives {found} logits, and id2label of the config names {num_labels} "
                "labels; name as many as there are logits."
            )
    check_tokenizer(model.encoder, tokenizer, pairs=model.config.text_pairs)


def longest_text(asked: int | None, model: GeepForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest text in tokens: what the encoder has positions for and the tokenizer is set to, or less if asked for.

    Raises:
        ValueError: If more is asked for, or nothing is left of a text.
    """
    positions, known = longest_input(model.encoder), int(tokenizer.model_max_length)
    limit = min(positions, known)
    if asked is not None and asked > limit:
        reason = "the encoder has no more positions" if positions <= known else "the tokenizer's model_max_length"
        raise ValueError(
            f"max_length={asked} is more than the {limit} tokens that the model reads ({reason}); ask for no more."
        )
    if limit < 3:
        raise ValueError(
            f"The model reads {limit} tokens ({positions} positions of the encoder, model_max_length of the tokenizer "
            f"is {known}), expected at least 3: two special tokens, one of text. Mend the config."
        )
    return limit if asked is None else asked
