"""Packed layers in 8 bits on CPUs: static, per-channel quantisation of weights and activations.

Every linear layer multiplies unsigned 8-bit activations by signed 8-bit weights (oneDNN; VNNI where the CPU has it).
The ranges of the activations are observed once, on texts (`observe`), so but for rounding a text's answer does not
depend on the texts beside it, as it does where ranges are taken from each batch. Three choices keep the answers close
to float32's:

- Each input channel has its own scale and zero point. Scales are folded into the weights, zero points into the bias,
  so this costs nothing at run time. (In BERT a few channels are far wider than the others.)
- Each output channel of a weight has its own scale.
- Between the two wide linear layers values stay in 8 bits under one scale, so the few channels with the largest range
  are left out and computed in float32, as LLM.int8 does (Dettmers et al. 2022): `FLOAT_CHANNELS` of them.

Attention, norms and residuals stay in float32.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from geep.backends.attention import PackedAttention
from geep.backends.between import Between
from geep.backends.few_tokens import FewTokens, RoundedLinear
from geep.backends.kernels import Rounding
from geep.backends.layout import Layout
from geep.backends.onednn import FUSED_ACTIVATIONS, FusedLinear, pad_rows
from geep.backends.packed_layer import PackedLayer
from geep.folder import RANGES_NAME, digest_tensors, named_by, publish

FLOAT_CHANNELS = 32
"""Channels between the two wide linear layers that stay in float32: the widest of each layer."""

FEW_TOKENS = 32
"""Tokens up to which a layer is one call (12x384 on two AMD EPYC cores): of more, oneDNN's products are faster."""

SITES = ("qkv", "out", "up", "down")
"""The linear layers of an encoder layer, by the names of `PackedLayer`; their inputs are what is observed."""

Range = tuple[Tensor, Tensor]


def is_available() -> bool:
    """Whether this build of torch has oneDNN's 8-bit linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


def largest_weight() -> int:
    """Largest 8-bit weight whose products this CPU adds up without overflow.

    x86 CPUs without VNNI add pairs of products in 16 bits: 2 · 255 · 64 fits, 2 · 255 · 127 does not.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return 64 if x86 and not torch.cpu._is_vnni_supported() else 127


@dataclass(frozen=True, slots=True)
class ActivationRanges:
    """Least and greatest value of every channel at the input of every linear layer.

    Attributes:
        sites: For each of `SITES`, a float32 tensor (num_layers, 2, channels): row 0 the least, row 1 the greatest.
    """

    sites: dict[str, Tensor]

    def __post_init__(self) -> None:
        if set(self.sites) != set(SITES):
            raise ValueError(f"Activation ranges need the sites {list(SITES)}, found {sorted(self.sites)}.")
        for name, ranges in self.sites.items():
            if ranges.ndim != 3 or ranges.shape[1] != 2 or ranges.dtype != torch.float32:
                raise ValueError(
                    f"Ranges of {name!r} must be float32 (num_layers, 2, channels), "
                    f"found {ranges.dtype} {tuple(ranges.shape)}."
                )
            if not torch.isfinite(ranges).all() or bool((ranges[:, 0] > ranges[:, 1]).any()):
                raise ValueError(f"Ranges of {name!r} must be finite and ascending; observe them again.")

    def of(self, layer: int, site: str) -> Range:
        """Range of each channel at a site of a layer (counted from 0)."""
        low, high = self.sites[site][layer]
        return low, high

    @property
    def digest(self) -> str:
        """Digest of all ranges."""
        return digest_tensors(self.sites, "")

    def save(self, path: str | Path, *, fingerprint: dict[str, str]) -> Path:
        """Write a safetensors file, with the digest of the model it belongs to, and return its path.

        `path` is the file if it ends in `.safetensors`, else a folder, in which the file is named by its contents.
        """
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path / named_by(RANGES_NAME, self.digest)
        tensors = {name: ranges.contiguous() for name, ranges in self.sites.items()}
        return publish(path, save_safetensors(tensors, fingerprint))

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: dict[str, str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            ValueError: If the file is damaged or belongs to another model.
        """
        advice = "run `geep profile --dtype int8` again"
        try:
            with safe_open(str(path), framework="pt") as file:
                found = file.metadata() or {}
                sites = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file itself cannot be walked)
            if found.get("model") != fingerprint["model"]:
                raise ValueError(
                    f"it was observed on model {found.get('model', '?')[:12]}, found {fingerprint['model'][:12]}"
                )
            return cls(sites)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} cannot be used ({error}); {advice}.") from error


def observe(layers: Sequence[PackedLayer], batches: Iterable[tuple[Tensor, Layout]]) -> ActivationRanges:
    """Run float32 layers over texts and note the range of every linear layer's input.

    Args:
        layers: The encoder's layers.
        batches: Embedded texts, (num_tokens, hidden), and where they lie.

    Raises:
        ValueError: If there is no token to observe, or the layers are of another form.
    """
    for layer in layers:
        check_form(layer)
    seen: dict[tuple[str, int], Range] = {}
    for hidden, layout in batches:
        if not len(hidden):
            continue
        for number, layer in enumerate(layers):

            def note(site: str, x: Tensor, number: int = number) -> None:
                low, high = x.amin(0), x.amax(0)
                if (site, number) in seen:
                    low, high = torch.minimum(low, seen[site, number][0]), torch.maximum(high, seen[site, number][1])
                seen[site, number] = low, high

            hidden = layer(hidden, layout, note)
    if not seen:
        raise ValueError("There is no token to observe activations on; give a few hundred texts.")
    return ActivationRanges(
        {
            site: torch.stack([torch.stack(seen[site, number]) for number in range(len(layers))]).float()
            for site in SITES
        }
    )


def check_form(layer: PackedLayer) -> None:
    """Refuse layers that are not built as BERT's are.

    Raises:
        ValueError: If a layer normalises first, or gates its wide part.
    """
    if layer.norm_first or layer.gate is not None:
        raise ValueError(
            "int8 runs layers that normalise sums and have a plain wide part, found one that normalises first or is "
            "gated (ModernBERT); use float32 or bfloat16."
        )


def rounded_linear(weight: Tensor, bias: Tensor | None, observed: Range) -> RoundedLinear:
    """Round a float32 layer (out, in) for inputs in these ranges, one for each input channel."""
    scale, zero = _steps(observed)
    folded = weight * scale
    most = largest_weight()
    weight_scale = folded.abs().amax(1).clamp(min=1e-12) / most
    rounded = (folded / weight_scale[:, None]).round_().clamp_(-most, most)
    # x = scale (q - zero), so the zero points add the same to every row.
    shifted = (0 if bias is None else bias) - (rounded * weight_scale[:, None]) @ zero
    return RoundedLinear(rounded.to(torch.int8), weight_scale, shifted, Rounding(1 / scale, zero + 0.5))


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """A linear layer on 8-bit inputs.

    Invariant: with q = `quantise(x)`, the result equals x W' + b up to the rounding of q and of the weights, for x
    within the observed range; values outside are cut to it.
    """

    weight: Tensor  # oneDNN's layout of signed 8-bit weights
    weight_scale: Tensor  # (out,)
    weight_zero: Tensor
    bias: Tensor
    quantise: Rounding  # of float32 inputs (num_tokens, in)

    @classmethod
    def of(cls, rounded: RoundedLinear) -> Self:
        """Lay out rounded weights."""
        return cls(
            weight=torch.ops.onednn.qlinear_prepack(rounded.weight, None),
            weight_scale=rounded.scale,
            weight_zero=torch.zeros(len(rounded.weight), dtype=torch.int64),
            bias=rounded.bias,
            quantise=rounded.quantise,
        )

    def __call__(self, q: Tensor) -> Tensor:
        """Return x W' + b, float32, for quantised inputs."""
        return torch.ops.onednn.qlinear_pointwise.default(
            *(q, 1.0, 0, self.weight, self.weight_scale, self.weight_zero, self.bias),
            *(1.0, 0, torch.float32, "none", [], ""),
        )

    def plus(self, q: Tensor, residual: Tensor) -> Tensor:
        """Return x W' + b + residual, float32, for quantised inputs."""
        return torch.ops.onednn.qlinear_pointwise.binary(
            *(q, 1.0, 0, self.weight, self.weight_scale, self.weight_zero, residual, self.bias),
            *(1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", [], ""),
        )

    def activated(self, q: Tensor, activation: tuple[str, str], step: float, zero: int) -> Tensor:
        """Return activation(x W' + b) as unsigned 8-bit numbers of this step and zero point."""
        name, algorithm = activation
        return torch.ops.onednn.qlinear_pointwise.default(
            *(q, 1.0, 0, self.weight, self.weight_scale, self.weight_zero, self.bias),
            *(step, zero, torch.uint8, name, [], algorithm),
        )


@dataclass(frozen=True, slots=True)
class Int8Layer:
    """`PackedLayer` in 8 bits; see the module's docstring."""

    qkv: Int8Linear
    attention: PackedAttention
    out: Int8Linear
    up: Int8Linear
    down: Int8Linear
    wide_step: float
    wide_zero: int
    float_up: FusedLinear  # to the channels that stay in float32
    float_down: FusedLinear  # back from them
    between: Between | None  # from behind attention to the second wide product; None: our kernel does not run this
    few: FewTokens | None  # all of it in one call, for few tokens; None: as above
    layer: PackedLayer

    @classmethod
    def of(cls, layer: PackedLayer, ranges: ActivationRanges, number: int) -> Self:
        """Quantise a float32 layer, the `number`th (from 0), for activations in the observed ranges.

        Raises:
            ValueError: If the layer is of another form, the activation is none that can be applied inside an 8-bit
                product, or the ranges are of another shape.
        """
        check_form(layer)
        if layer.activation_name not in FUSED_ACTIVATIONS:
            raise ValueError(
                f"int8 runs the activations {sorted(FUSED_ACTIVATIONS)}, found {layer.activation_name!r}; "
                "use another dtype."
            )
        observed = {site: ranges.of(number, site) for site in SITES}
        weights = {"qkv": layer.qkv, "out": layer.out, "up": layer.up, "down": layer.down}
        for site, (weight, _) in weights.items():
            if len(observed[site][0]) != weight.shape[1]:
                raise ValueError(
                    f"The ranges of {site!r} have {len(observed[site][0])} channels, the model {weight.shape[1]}; "
                    "run `geep profile --dtype int8` for this model."
                )
        low, high = observed["down"]
        widest = torch.maximum(high, -low).argsort(descending=True)
        in_float = widest[:FLOAT_CHANNELS].sort().values
        others = widest[FLOAT_CHANNELS:]
        if len(others):
            low, high = low[others].min(), high[others].max()
        else:  # a layer this narrow runs in float32 altogether
            low, high = low.min(), high.max()
        width = weights["down"][0].shape[1]
        down_range = (low.expand(width), high.expand(width))
        step, zero = _steps(down_range)
        down_weight = layer.down[0].clone()
        down_weight[:, in_float] = 0
        rounded = {
            "qkv": rounded_linear(*layer.qkv, observed["qkv"]),
            "out": rounded_linear(*layer.out, observed["out"]),
            "up": rounded_linear(*layer.up, observed["up"]),
            "down": rounded_linear(down_weight, layer.down[1], down_range),
        }
        linears = {site: Int8Linear.of(each) for site, each in rounded.items()}
        attention = PackedAttention.of(layer.qkv, layer.num_heads, layer.mixer)
        float_up = layer.up[0][in_float], None if layer.up[1] is None else layer.up[1][in_float]
        float_down, norm = layer.down[0][:, in_float], layer.attention_norm
        fused = FUSED_ACTIVATIONS[layer.activation_name]
        between = None
        if norm is not None and Between.runs(len(float_down), len(in_float), fused):
            between = Between((norm.weight, norm.bias, norm.eps), float_up, float_down, fused, linears["up"].quantise)
        few = None
        if between is not None and FewTokens.runs(attention, len(float_down), width):
            few = FewTokens(rounded, attention, between, (float(step[0]), int(zero[0])), layer.output_norm)
        return cls(
            **linears,
            attention=attention,
            wide_step=float(step[0]),
            wide_zero=int(zero[0]),
            float_up=FusedLinear.of(*float_up),
            float_down=FusedLinear.of(float_down, None),
            between=between,
            few=few,
            layer=layer,
        )

    def __call__(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Run the layer on packed tokens (num_tokens, hidden), float32 in and out."""
        if self.few is not None and len(hidden) <= FEW_TOKENS:
            return self.few(hidden, layout)
        num_tokens, hidden, layer = len(hidden), pad_rows(hidden), self.layer
        mixed = self.attention(self.qkv(self.qkv.quantise(hidden)), layout, self.out.quantise)
        sums, fused = self.out.plus(mixed, hidden), FUSED_ACTIVATIONS[layer.activation_name]
        if self.between is not None:
            in_float, rounded = self.between(sums)
        else:
            hidden, _ = layer.between(sums)
            rounded = self.up.quantise(hidden)
            in_float = self.float_down.plus(self.float_up(hidden, fused), hidden)
        wide = self.up.activated(rounded, fused, self.wide_step, self.wide_zero)
        return layer.after(self.down.plus(wide, in_float))[:num_tokens]

    def first_tokens(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Run the layer for the first token of each text, in float32: so few rows that the plain layer serves."""
        return self.layer.first_tokens(hidden, layout)


def _steps(observed: Range) -> tuple[Tensor, Tensor]:
    """Step and zero point, both (channels,), of unsigned 8-bit numbers that cover ranges and hold 0 exactly."""
    low, high = observed[0].clamp(max=0), observed[1].clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-8)
    return scale, (-low / scale).round()
