"""Whether layers that are run by hand answer as Hugging Face's model does: tried, not believed.

Which switches of a config make a layer another one is known of the versions that were read. What nobody thought of
shows here, before the first text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geep.backends.mixers import telling_length
from geep.backends.packed import PackedBackend
from geep.backends.packed_layer import packed_layers
from geep.backends.padded import PaddedBackend
from geep.backends.protocol import Backend, TokenBatch
from geep.modeling import GeepForSequenceClassification, first_lengths, made_up_inputs

# What rounding may do to logits, as a part of the largest: 24 layers in float32 stay well below it, and one activation
# in place of another, or a norm's other epsilon, does not. Of other dtypes 16 roundings.
_LEAST_ALLOWED = 2e-4


def unlike_hugging_face(model: GeepForSequenceClassification, *, packed: bool, max_length: int) -> str | None:
    """Say how far layers by hand are from Hugging Face's own forward on a few made-up texts; None where they are not.

    Args:
        model: On any device, in any dtype, not in training.
        packed: Whether the packed layers are tried, in their plain form; else Hugging Face's own, one after another.
        max_length: Longest text in tokens.

    Raises:
        ValueError: If the model itself does not run.
    """
    # Far distances are seen only in a text that is long enough: one of those, and one that is padded to it.
    longest = telling_length(model.encoder.config) if packed else 0
    given = made_up_inputs(model.encoder, max_length, (longest, 4) if longest > 6 else (6, 2, 4))
    batch = _packed(given)
    with torch.inference_mode():
        # Hugging Face's own layers need no look at what is between them.
        depths = model.config.depths if packed else model.config.depths[-1:]
        expected = _by_hugging_face(model, given, depths)
        backend: Any = PackedBackend(model, packed_layers(model), model.dtype) if packed else PaddedBackend(model)
        found = _by_hand(backend, batch, depths)
    if not torch.isfinite(expected).all():
        return None  # broken as it is, which the first text says
    difference = float((found - expected).abs().max())
    allowed = max(_LEAST_ALLOWED, 16 * torch.finfo(model.dtype).eps) * max(1.0, float(expected.abs().max()))
    if difference <= allowed:
        return None
    return (
        f"The {'packed' if packed else 'padded'} layers do not answer as Hugging Face's "
        f"{model.encoder.config.model_type!r} does: on made-up texts the logits differ by {difference:.2g}, where "
        f"rounding explains {allowed:.2g}"
    )


def _packed(given: dict[str, Tensor]) -> TokenBatch:
    """The same texts without padding."""
    mask, types = given["attention_mask"].bool(), given.get("token_type_ids")
    segments = None if types is None else types[mask].numpy()
    return TokenBatch(given["input_ids"][mask].numpy(), segments, mask.sum(1).numpy())


def _by_hugging_face(model: GeepForSequenceClassification, given: dict[str, Tensor], depths: tuple[int, ...]) -> Tensor:
    """Logits at some depths, the full model last, from the hidden states of the encoder's own forward."""
    given = {name: values.to(model.device) for name, values in given.items()}
    try:
        found = model.encoder(**given, output_hidden_states=len(depths) > 1, return_dict=True)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The encoder does not run on made-up texts of at most {given['input_ids'].shape[1]} tokens of its "
            f"vocabulary ({error}); its config and its weights do not belong together."
        ) from error
    # An ALBERT with several layers in a group gives the hidden states of each of them.
    each = 0 if found.hidden_states is None else (len(found.hidden_states) - 1) // depths[-1]
    states = [model.finish(found.hidden_states[each * layer]) for layer in depths[:-1]] + [found.last_hidden_state]
    heads = map(model.head_at, depths)
    separator, mask = model.config.separator_id, given["attention_mask"]
    firsts = None if separator is None else first_lengths(given["input_ids"], mask, separator)
    return torch.stack([head(state, mask, firsts) for head, state in zip(heads, states, strict=True)])


def _by_hand(backend: Backend[Any], batch: TokenBatch, depths: tuple[int, ...]) -> Tensor:
    live, logits = backend.start(batch), []
    for layer in range(1, depths[-1] + 1):
        live = backend.advance(live, layer, len(batch))
        if layer in depths:
            logits.append(backend.exit_logits(live, layer, 0, len(batch)))
    return torch.stack(logits)
