"""An encoder's layer on tokens without padding: the reference of the packed backends, and where its weights are.

One class serves all families: `forms.py` says where they keep their weights and what they build otherwise, `mixers.py`
how their tokens look at each other. Linear layers, norms and activations run on (num_tokens, hidden). Attention is the
only place where texts matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from geep.backends.attention import Linear, attend_first, attend_runs, mix_runs
from geep.backends.forms import FORMS, Form
from geep.backends.layout import Layout
from geep.backends.mixers import DotProduct, Mixer, Rotary, mixers_of, mixes_plainly, paired, why_not_mixed
from geep.modeling import GeepForSequenceClassification, layer_calls

X = TypeVar("X")
Y = TypeVar("Y")

Watch = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm's weights."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise every row of x (…, width)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One encoder layer on packed tokens: tokens of a text mix, then each goes through two wide linear layers.

    Attributes:
        qkv: Queries, keys and values in one, (3 hidden, hidden).
        out: Behind attention.
        up: To the wide part.
        gate: Multiplies the activated wide part; None in most families.
        down: Back from it.
        attention_norm: Of the sum behind attention, or of its input where `norm_first`; None: there is none (the first
            layer of ModernBERT).
        output_norm: The same of the wide part.
        activation: Of the wide part.
        activation_name: As transformers names it.
        num_heads: Attention heads.
        norm_first: See `Form`.
        mixer: How tokens look at each other.
    """

    qkv: Linear
    out: Linear
    up: Linear
    gate: Linear | None
    down: Linear
    attention_norm: Norm | None
    output_norm: Norm
    activation: Callable[[Tensor], Tensor]
    activation_name: str
    num_heads: int
    norm_first: bool
    mixer: Mixer

    @classmethod
    def from_module(cls, layer: nn.Module, form: Form, config: PreTrainedConfig, mixer: Mixer) -> Self:
        """Take the weights of a Hugging Face layer; only query, key and value are copied, to lie in one matrix."""

        def linear(name: str) -> Linear:
            module: Any = layer.get_submodule(form.parts[name])
            return module.weight.detach(), None if module.bias is None else module.bias.detach()

        def norm(name: str) -> Norm | None:
            module: Any = layer.get_submodule(form.parts[name])
            if isinstance(module, nn.Identity):
                return None
            return Norm(module.weight.detach(), None if module.bias is None else module.bias.detach(), module.eps)

        activation, output_norm = getattr(config, form.activation), norm("output_norm")
        assert output_norm is not None  # of every family
        up, gate = _halves(linear("up")) if form.is_gated else (linear("up"), None)
        return cls(
            qkv=_joined(
                [linear(name) for name in ("qkv", "query", "key", "value") if name in form.parts],
                config.num_attention_heads,
                mixer,
            ),
            out=linear("out"),
            up=up,
            gate=gate,
            down=linear("down"),
            attention_norm=norm("attention_norm"),
            output_norm=output_norm,
            activation=F.gelu if activation == "gelu" else ACT2FN[activation],
            activation_name=activation,
            num_heads=config.num_attention_heads,
            norm_first=form.norm_first,
            mixer=mixer,
        )

    def to(self, dtype: torch.dtype) -> PackedLayer:
        """Return the layer with its matrices in another dtype, for a CPU; norms and mixer stay in float32."""

        def cast(linear: Linear) -> Linear:
            return linear[0].to(dtype), None if linear[1] is None else linear[1].to(dtype)

        return replace(
            self,
            qkv=cast(self.qkv),
            out=cast(self.out),
            up=cast(self.up),
            gate=None if self.gate is None else cast(self.gate),
            down=cast(self.down),
        )

    def __call__(self, hidden: Tensor, layout: Layout, watch: Watch | None = None) -> Tensor:
        """Run the layer on packed tokens (num_tokens, hidden); `watch` is shown the input of each linear layer."""
        before = self.before(hidden)
        if watch is not None:
            watch("qkv", before)
        return self._finish(attend_runs(F.linear(before, *self.qkv), layout, self.num_heads, self.mixer), hidden, watch)

    def first_tokens(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Run the layer for the first token of each text that has one: (num_tokens, hidden) to (texts, hidden)."""
        rows = torch.from_numpy(layout.offsets[:-1][layout.lengths > 0]).to(hidden.device)
        first = hidden.index_select(0, rows)
        if self.norm_first or self.mixer != DotProduct():
            # What depends on distances does not fall out of the softmax; still, the rest runs for these tokens alone.
            qkv = F.linear(self.before(hidden), *self.qkv)
            return self._finish(attend_runs(qkv, layout, self.num_heads, self.mixer).index_select(0, rows), first)
        mixed = attend_first(
            first, self.qkv, self.num_heads, lambda query, scale: mix_runs(query, scale, hidden, layout)
        )
        return self._finish(mixed, first)

    def before(self, hidden: Tensor) -> Tensor:
        """What attention reads."""
        return self.attention_norm(hidden) if self.norm_first and self.attention_norm is not None else hidden

    def between(self, middle: Tensor) -> tuple[Tensor, Tensor]:
        """Of the sum behind attention, what is added to what the wide part gives, and what the wide part reads."""
        if self.norm_first:
            return middle, self.output_norm(middle)
        middle = middle if self.attention_norm is None else self.attention_norm(middle)
        return middle, middle

    def after(self, hidden: Tensor) -> Tensor:
        """The layer's output, of the sum behind the wide part."""
        return hidden if self.norm_first else self.output_norm(hidden)

    def _finish(self, mixed: Tensor, hidden: Tensor, watch: Watch | None = None) -> Tensor:
        """Everything after attention."""
        middle, read = self.between(F.linear(mixed, *self.out).add_(hidden))
        wide = self.activation(F.linear(read, *self.up))
        if self.gate is not None:
            wide = F.linear(read, *self.gate).mul_(wide)
        if watch is not None:
            for name, x in (("out", mixed), ("up", read), ("down", wide)):
                watch(name, x)
        return self.after(F.linear(wide, *self.down).add_(middle))


def _halves(linear: Linear) -> tuple[Linear, Linear]:
    """Cut a linear layer into one for the lower and one for the upper half of its outputs; views."""
    weight, bias = linear
    lower, upper = weight.chunk(2)
    return (lower, None if bias is None else bias.chunk(2)[0]), (upper, None if bias is None else bias.chunk(2)[1])


def _joined(parts: Sequence[Linear], num_heads: int, mixer: Mixer) -> Linear:
    """Put queries, keys and values, or what holds them already, into one linear layer, in the mixer's order."""
    weights, biases = zip(*parts, strict=True)

    def join(rows: Sequence[Tensor]) -> Tensor:
        if not isinstance(mixer, Rotary):
            return torch.cat(tuple(rows)) if len(rows) > 1 else rows[0]
        query, key, value = torch.cat(tuple(rows)).chunk(3)
        return torch.cat([paired(query, num_heads), paired(key, num_heads), value])

    return join(weights), None if biases[0] is None else join(biases)


# Switches of a config that make a layer another one, and the value at which it is the one that is built here. A config
# that lacks a switch has it at that value.
_PLAIN: Mapping[str, object] = {
    "is_decoder": False,  # tokens see only those before them
    "add_cross_attention": False,
}


def why_not_packed(config: PreTrainedConfig) -> str | None:
    """Say what makes an encoder's layers other than those of `FORMS`; None where nothing does."""
    if config.model_type not in FORMS:
        return f"Packed layers are those of {sorted(FORMS)}, got {config.model_type!r}"
    switches = dict(_PLAIN)
    if mixes_plainly(config):  # others do not read it
        switches["position_embedding_type"] = "absolute"
    for name, plain in switches.items():
        found = getattr(config, name, plain)
        if found is not None and found != plain:
            return f"Packed layers have {name}={plain!r}, the encoder's config has {found!r}"
    return why_not_mixed(config)


def packed_layers(model: GeepForSequenceClassification) -> tuple[PackedLayer, ...]:
    """The encoder's layers, on the model's own weights, in the order in which they run; some may be the same.

    Where one step of the encoder's loop is several layers, they stand one behind another; see `steps_of`.

    Raises:
        ValueError: If the encoder's layer is another one.
    """
    encoder = model.encoder
    if (reason := why_not_packed(encoder.config)) is not None:
        raise ValueError(f"{reason}; use backend='padded'.")
    form = FORMS[encoder.config.model_type]
    one_token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        steps = [
            call.module for call in layer_calls(encoder, model.encoder_inputs(one_token, one_token + 1, None)).layers
        ]
    modules = [
        layer for step in steps for layer in (step.get_submodule(form.inner).children() if form.inner else [step])
    ]
    mixers = mixers_of(encoder, modules)
    return each_once(
        lambda pair: PackedLayer.from_module(pair[0], form, encoder.config, pair[1]),
        list(zip(modules, mixers, strict=True)),
        lambda pair: id(pair[0]),
    )


def each_once(make: Callable[[X], Y], items: Sequence[X], key: Callable[[X], object] = id) -> tuple[Y, ...]:
    """Make something of each item, and the same thing of the same item: ALBERT's layers share their weights."""
    made: dict[object, Y] = {}
    for item in items:
        if key(item) not in made:
            made[key(item)] = make(item)
    return tuple(made[key(item)] for item in items)


def steps_of(layers: Sequence[X], number: int, num_layers: int) -> Sequence[X]:
    """The packed layers that layer `number` (from 1) of an encoder's `num_layers` is: one, in ALBERT maybe several."""
    each = len(layers) // num_layers
    return layers[(number - 1) * each : number * each]
