"""Encoder families of Hugging Face, and an encoder taken apart into its layers.

Read `FAMILIES` (what differs between encoders), then `layer_calls`. Nothing is known here of exits.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Family:
    """What geep has to know of an encoder family of Hugging Face; everything else is the encoder's own code.

    Attributes:
        layers: Dotted path from the encoder to the modules that its layer loop calls.
        row_arguments: Arguments of a layer whose first axis is the batch; cut with it when only some rows go on.
        output: Length of the tuple that a layer returns, hidden state first; 0: the hidden state alone.
        final_norm: Dotted path of a norm applied after the last layer; exits read through it too.
        init_kwargs: Extra arguments for building the encoder (pooling layers are not used).
        has_token_type_ids: Whether the encoder takes `token_type_ids`.
        has_position_ids: Whether its embeddings take `position_ids`.
        positions_after_pad: Whether position ids start at `pad_token_id + 1` (RoBERTa) instead of 0.
    """

    layers: str
    row_arguments: tuple[str, ...] = ("attention_mask",)
    output: int = 0
    final_norm: str | None = None
    init_kwargs: Mapping[str, Any] | None = None
    has_token_type_ids: bool = True
    has_position_ids: bool = True
    positions_after_pad: bool = False


ProblemType = Literal["single_label_classification", "multi_label_classification"]


_NO_POOLER: Mapping[str, Any] = {"add_pooling_layer": False}


FAMILIES: dict[str, Family] = {
    "bert": Family("encoder.layer", init_kwargs=_NO_POOLER),
    "roberta": Family("encoder.layer", init_kwargs=_NO_POOLER, positions_after_pad=True),
    "xlm-roberta": Family("encoder.layer", init_kwargs=_NO_POOLER, positions_after_pad=True),
    "electra": Family("encoder.layer"),
    "distilbert": Family("transformer.layer", has_token_type_ids=False),
    "mpnet": Family(
        "encoder.layer",
        row_arguments=("attention_mask", "position_bias"),
        output=1,
        init_kwargs=_NO_POOLER,
        has_token_type_ids=False,
        positions_after_pad=True,
    ),
    "albert": Family("encoder.albert_layer_groups", init_kwargs=_NO_POOLER),
    "deberta-v2": Family("encoder.layer", output=2),
    "modernbert": Family("layers", final_norm="final_norm", has_token_type_ids=False, has_position_ids=False),
}


def family_of(encoder_config: PreTrainedConfig) -> Family:
    """Return the family row of an encoder config.

    Raises:
        ValueError: If the family is not in `FAMILIES`, or the encoder mixes a convolution into its layers.
    """
    model_type = encoder_config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"Unsupported encoder {model_type!r}; supported: {sorted(FAMILIES)}.")
    if getattr(encoder_config, "conv_kernel_size", 0):
        raise ValueError(
            f"Encoder {model_type!r} has conv_kernel_size={encoder_config.conv_kernel_size}: a convolution beside its "
            "first layer, which exits cannot see. Use a checkpoint without it (DeBERTa-v3 has none)."
        )
    return FAMILIES[model_type]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One step of an encoder's layer loop: the module and the arguments Hugging Face gives it beside the hidden state.

    The arguments do not depend on the hidden state (masks, position biases), so the layer may be run on any of them:
    on the output of the layer before it, or, for the shared exit, on the output of any layer.
    """

    module: nn.Module
    arguments: Mapping[str, Any]
    row_arguments: tuple[str, ...]
    returns_tuple: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run the layer on `hidden` (rows, seq_len, hidden), whose rows are a prefix of the batch; same shape out."""
        out = self.module(hidden, **self._for_rows(hidden.shape[0]))
        return out[0] if self.returns_tuple or isinstance(out, tuple) else out

    def select(self, rows: Tensor, gathered: dict[int, Tensor]) -> LayerCall:
        """Keep some rows of the batch; arguments that several layers share are gathered once, into `gathered`."""
        taken = {}
        for name in self.row_arguments:
            value = self.arguments.get(name)
            if isinstance(value, Tensor):
                if id(value) not in gathered:
                    gathered[id(value)] = value.index_select(0, rows) if value.shape[0] > 1 else value
                taken[name] = gathered[id(value)]
        return replace(self, arguments={**self.arguments, **taken})

    def _for_rows(self, rows: int) -> Mapping[str, Any]:
        """Cut the row-indexed arguments to the first `rows` rows; views, no copies."""
        cut = {}
        for name in self.row_arguments:
            value = self.arguments.get(name)
            if isinstance(value, Tensor) and value.shape[0] > max(rows, 1):
                cut[name] = value[:rows]
        return {**self.arguments, **cut} if cut else self.arguments


@dataclass(frozen=True, slots=True)
class LayerCalls:
    """An encoder's work on one padded batch: embedding output (batch, seq_len, hidden) and the layers still to run."""

    embedding_output: Tensor
    layers: tuple[LayerCall, ...]


class _StandIn(nn.Module):
    """Stands in for a layer: notes how it is called and hands the hidden state through unchanged."""

    def __init__(self, module: nn.Module, calls: list[tuple[nn.Module, Tensor, dict[str, Any]]], output: int) -> None:
        super().__init__()
        # Kept out of nn.Module's registry: the recorder must not own the layer's parameters.
        object.__setattr__(self, "recorded", module)
        self.calls = calls
        self.output = output

    def __getattr__(self, name: str) -> Any:
        # ModernBERT's loop reads `attention_type` from the layer it is about to call.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["recorded"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = _argument_names(type(self.recorded).forward)
        self.calls.append((self.recorded, hidden, {**dict(zip(names, args, strict=False)), **kwargs}))
        return hidden if self.output == 0 else (hidden,) + (None,) * (self.output - 1)


@cache
def _argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a layer's positional arguments after the hidden state."""
    return tuple(inspect.signature(forward).parameters)[2:]


def _shallow(module: nn.Module) -> nn.Module:
    """Copy a module so that its children can be replaced; parameters and the children themselves are shared."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    return view


def layer_calls(encoder: PreTrainedModel, inputs: Mapping[str, Tensor | None]) -> LayerCalls:
    """Run an encoder's embeddings and mask code and return its layer loop, not yet run.

    The encoder's own forward runs once on a shallow view whose layers only note how they are called. So embeddings,
    masks, position biases and the order of the layers (shared ones included) are Hugging Face's own, for every family.
    Running all calls in order gives `hidden_states` of the encoder exactly. The encoder itself is not touched.

    Args:
        encoder: A model of one of `FAMILIES`.
        inputs: `input_ids`, `attention_mask`, `token_type_ids`, each (batch, seq_len) or None.
    """
    family = family_of(encoder.config)
    calls: list[tuple[nn.Module, Tensor, dict[str, Any]]] = []
    *parents, name = family.layers.split(".")
    view = inner = _shallow(encoder)
    for parent in parents:
        child = _shallow(inner._modules[parent])  # type: ignore[arg-type]
        inner._modules[parent] = child
        inner = child
    inner._modules[name] = nn.ModuleList(
        _StandIn(layer, calls, family.output)
        for layer in inner._modules[name]  # type: ignore[union-attr]
    )
    view(**{key: value for key, value in inputs.items() if value is not None})
    return LayerCalls(
        embedding_output=calls[0][1],
        layers=tuple(
            LayerCall(module, arguments, family.row_arguments, family.output > 0) for module, _, arguments in calls
        ),
    )
