"""CUDA backend: the packed staircase on a GPU, with nothing that waits for the device and few launches.

Texts lie packed, as in `geep.backends.packed`, and a layer runs on a prefix of them. What differs:

- attention on short texts in tiles (`geep.backends.tiles`), on longer ones by PyTorch's variable-length flash kernel;
- what follows attention is one function, compiled once and used by all layers, whose weights are arguments;
- small batches replay CUDA graphs of layers and of exits (`geep.backends.graphs`);
- token ids and all that is derived from lengths reach the device in one copy (`geep.backends.staging`) and stay there.

Texts that end at a layer run it whole: to run it for [CLS] alone, as `packed` does on CPUs, made every size slower on
the GPU it was tried on. Tests run the same code on CPU tensors, those marked `gpu` on a device.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from geep.backends.attention import attend_runs
from geep.backends.graphs import BucketShape, LayerGraphs, TextPlaces
from geep.backends.int8 import ActivationRanges
from geep.backends.layout import Layout
from geep.backends.mixers import TILE, mixes_plainly
from geep.backends.packed import PackedBackend, embed, joined, position_ids
from geep.backends.packed_layer import PackedLayer, each_once, packed_layers, steps_of
from geep.backends.protocol import FLOAT_DTYPES, TORCH_DTYPES, Integers, TokenBatch, token_positions
from geep.backends.staging import Staging
from geep.backends.tiles import Tiles, attend_tiles, plan_tiles, tile_bias
from geep.modeling import GeepForSequenceClassification, Spans, family_of

logger = logging.getLogger(__name__)

# query, key, value (num_tokens, num_heads, head), offsets of queries and of keys, longest of both -> as query
Varlen = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """How the backend runs; every choice gives the same answers up to rounding.

    Attributes:
        attention: "tiles" (texts up to 128 tokens), "varlen" (half precision on CUDA only) or "runs" (one call for
            each run of equal lengths). "auto": tiles where no text of the batch is longer than a tile, else varlen,
            or runs where there is no varlen; varlen, too, for batches too large for graphs of `varlen_from` tokens a
            text.
        varlen_from: On an H200 a layer takes as long in tiles as with varlen somewhere between 25 tokens a text (tiles
            are 6 % faster) and 64 (9 % slower).
        compile: Whether to compile what follows attention. None: on CUDA.
        graphs: Whether small batches in tiles replay CUDA graphs. None: on CUDA.
        graph_tokens: Largest batch for graphs. On the H200 that it was run on, the launches of a layer took the host
            some 500 µs, and a layer of BERT-base takes the device some 25 ns a token: at this size half as long, in
            buffers a third larger than the batch, too. How far above it graphs pay is not yet measured.
        record_after: Uses of a layer, or of an exit, at a size before its graph is recorded: what is used once or twice
            is not worth the milliseconds of recording; from then on a replay saves those launches at each use.
    """

    attention: Literal["auto", "tiles", "varlen", "runs"] = "auto"
    varlen_from: int = 48
    compile: bool | None = None
    graphs: bool | None = None
    graph_tokens: int = 8192
    record_after: int = 2


Pair = tuple[Tensor, Tensor | None]


class LayerWeights(NamedTuple):
    """Weights of what follows attention, each matrix (out, in) before its bias; norms are scale and shift."""

    out: Pair
    attention_norm: Pair | None
    up: Pair
    gate: Pair | None
    down: Pair
    output_norm: Pair

    @classmethod
    def of(cls, layer: PackedLayer) -> Self:
        """Take the tensors of a packed layer."""
        norm = layer.output_norm
        # What a layer that normalises first does before attention is not part of this.
        first = None if layer.norm_first or layer.attention_norm is None else layer.attention_norm
        attention_norm = None if first is None else (first.weight, first.bias)
        return cls(layer.out, attention_norm, layer.up, layer.gate, layer.down, (norm.weight, norm.bias))


# mixed values (rows, hidden), the layer's input (rows, hidden), weights -> the layer's output (rows, hidden)
Finish = Callable[[Tensor, Tensor, LayerWeights], Tensor]


def make_finish(layer: PackedLayer) -> Finish:
    """Make the function of all that follows attention in layers like this one."""
    activation, eps, norm_first = layer.activation, layer.output_norm.eps, layer.norm_first

    def finish(mixed: Tensor, hidden: Tensor, weights: LayerWeights) -> Tensor:
        size = hidden.shape[1:]
        hidden = F.linear(mixed, *weights.out) + hidden
        if weights.attention_norm is not None:
            hidden = F.layer_norm(hidden, size, *weights.attention_norm, eps)
        read = F.layer_norm(hidden, size, *weights.output_norm, eps) if norm_first else hidden
        wide = activation(F.linear(read, *weights.up))
        if weights.gate is not None:
            wide = wide * F.linear(read, *weights.gate)
        hidden = F.linear(wide, *weights.down) + hidden
        return hidden if norm_first else F.layer_norm(hidden, size, *weights.output_norm, eps)

    return finish


@dataclass(frozen=True, slots=True)
class CudaLayer:
    """A layer: what comes before its tokens mix, and how they do, is the packed layer's; the rest is `finish`."""

    packed: PackedLayer
    weights: LayerWeights
    finish: Finish

    def qkv(self, hidden: Tensor) -> Tensor:
        """Queries, keys and values: (num_tokens, hidden) to (num_tokens, 3 hidden)."""
        return F.linear(self.packed.before(hidden), *self.packed.qkv)

    def in_tiles(self, hidden: Tensor, tiles: Tiles) -> Tensor:
        """Run the layer on tokens that lie in tiles."""
        mixed = attend_tiles(self.qkv(hidden), tiles, self.packed.num_heads, self.packed.mixer)
        return self.finish(mixed, hidden, self.weights)


def compiled(finish: Finish, layers: Sequence[LayerWeights], **options: Any) -> Finish:
    """Compile for any number of rows; weights are arguments, so all layers share what is compiled.

    Args:
        finish: The function.
        layers: All weights it will see. Their sizes are marked as fixed, so that only the rows vary.
        **options: Passed on to `torch.compile`.
    """
    for weights in layers:
        for tensor in (tensor for pair in weights if pair is not None for tensor in pair if tensor is not None):
            torch._dynamo.mark_static(tensor)
    return torch.compile(finish, dynamic=True, **options)


@dataclass(frozen=True, slots=True)
class CudaTexts:
    """Live texts.

    Attributes:
        hidden: Hidden states, (num_tokens, hidden).
        lengths: Tokens of each text, on the host, (num_texts,).
        offsets: Where each text begins, and the end of the last, on the device, int32, (num_texts + 1,).
        longest: Tokens of the longest text, or more.
        tiles: Where tokens lie in tiles; None where attention runs otherwise.
        firsts: Tokens of the first text of each pair, on the host, (num_texts,); None where none is told apart.
        firsts_there: The same on the device, int32.
    """

    hidden: Tensor
    lengths: Integers
    offsets: Tensor
    longest: int
    tiles: Tiles | None
    firsts: Integers | None
    firsts_there: Tensor | None

    def prefix(self, num_texts: int) -> CudaTexts:
        """Keep the first texts; hidden states are a view."""
        if num_texts == len(self.lengths):
            return self
        num_tokens = int(self.lengths[:num_texts].sum())
        return CudaTexts(
            self.hidden[:num_tokens],
            self.lengths[:num_texts],
            self.offsets[: num_texts + 1],
            self.longest,
            None if self.tiles is None else self.tiles.prefix(num_texts, num_tokens),
            None if self.firsts is None else self.firsts[:num_texts],
            None if self.firsts_there is None else self.firsts_there[:num_texts],
        )


@dataclass(frozen=True, slots=True)
class CudaBackend:
    """The CUDA backend; see the module's docstring and `Backend`.

    Runs on CPU tensors too, uncompiled and without graphs, for tests; `PackedBackend` is faster there.
    """

    # A layer on a few thousand tokens takes less than to pick texts out: plans, a gather, buffers loaded anew.
    keeps_above: ClassVar[float] = 0.5

    model: GeepForSequenceClassification
    options: CudaOptions
    layers: tuple[CudaLayer, ...]
    varlen: Varlen | None
    staging: Staging
    graphs: LayerGraphs | None

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Whether the encoder's layer is one that `packed` runs."""
        return PackedBackend.supports(config)

    @classmethod
    def dtypes(cls, device_type: str) -> tuple[str, ...]:
        """Dtypes it runs on a kind of device, its default first."""
        return FLOAT_DTYPES.get(device_type, ())

    @classmethod
    def model_dtype(cls, dtype: str, device_type: str) -> torch.dtype:
        """The dtype itself: the model is cast as a whole."""
        return TORCH_DTYPES[dtype]

    @classmethod
    def build(
        cls,
        model: GeepForSequenceClassification,
        *,
        dtype: str,
        ranges: ActivationRanges | None = None,
        options: CudaOptions | None = None,
    ) -> Self:
        """Take a model that is on its device, in its dtype, in eval mode.

        Raises:
            ValueError: If the family's layer is another one, or the device or dtype cannot run what `options` ask for.
            ImportError: If `options` ask to compile and Triton is not there.
        """
        options = CudaOptions() if options is None else options
        packed = packed_layers(model)
        weights, device, config = each_once(LayerWeights.of, packed), model.device, model.encoder.config
        varlen = _find_varlen(model, packed[0].num_heads) if mixes_plainly(config) else None
        if options.attention == "varlen" and not mixes_plainly(config):
            raise ValueError(
                f"attention='varlen' knows no distances between tokens, which {config.model_type!r} needs; "
                "use attention='auto'."
            )
        if options.attention == "varlen" and varlen is None:
            raise ValueError(
                f"attention='varlen' needs float16 or bfloat16 on a CUDA device and torch.nn.attention.varlen, found "
                f"{model.dtype} on {device}, torch {torch.__version__}; use attention='auto'."
            )
        finish = make_finish(packed[0])
        if _may_compile(options.compile, device):
            finish = compiled(finish, weights)
        layers = tuple(CudaLayer(*pair, finish) for pair in zip(packed, weights, strict=True))
        graphs = None
        if device.type == "cuda" if options.graphs is None else options.graphs:
            graphs = LayerGraphs(
                lambda layer, hidden, tiles: layers[layer - 1].in_tiles(hidden, tiles),
                BucketShape(
                    model.config.hidden_size,
                    model.config.num_labels or 0,
                    tells_texts_apart=model.config.separator_id is not None,
                    dtype=model.dtype,
                    device=device,
                ),
                max_tokens=options.graph_tokens,
                record_after=options.record_after,
            )
        return cls(model, options, layers, varlen, Staging(device), graphs)

    def start(self, batch: TokenBatch) -> CudaTexts:
        """Embed texts with the encoder's own embedding module, every token at its position in its text."""
        encoder = self.model.encoder
        family, rows = family_of(encoder.config), {"input_ids": batch.input_ids}
        if family.has_position_ids:
            rows["position_ids"] = position_ids(batch, encoder)
        if family.has_token_type_ids and batch.token_type_ids is not None:
            rows["token_type_ids"] = batch.token_type_ids
        found, place = self._place(batch.lengths, batch.firsts(self.model.config.separator_id), *rows.values())
        inputs = {name: row[None] for name, row in zip(rows, found, strict=True)}
        if family.has_token_type_ids:
            # Always given: without them Hugging Face's module would look them up by position, and would want int64.
            inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
        return place(embed(encoder, inputs))

    def advance(self, live: CudaTexts, layer: int, num_texts: int, *, continuing: int | None = None) -> CudaTexts:
        """Run a layer on a prefix of the texts, those that end there like the others; the prefix is a view."""
        before, live = live.hidden, live.prefix(num_texts)
        for number in steps_of(range(1, len(self.layers) + 1), layer, self.model.config.num_hidden_layers):
            hidden = self._run(live, number, before)
            before, live = hidden, replace(live, hidden=hidden)
        return live

    def exit_logits(
        self, live: CudaTexts, layer: int, start: int, stop: int, *, head: nn.Module | None = None
    ) -> Tensor:
        """Run the classifier of a layer, or another head, on a range of texts: logits in the model's dtype or float32.

        Where the texts' hidden states lie in a graph's buffers, the classifier is replayed for all of them.
        """
        reader: Any = self.model.head_at(layer) if head is None else head
        if head is None and self.graphs is not None:
            replayed = self.graphs.exit_logits(reader, live.hidden, start, stop, self.model.finish)
            if replayed is not None:
                return replayed
        first = int(live.lengths[:start].sum())
        lengths = live.lengths[start:stop]
        hidden = live.hidden[first : first + int(lengths.sum())]
        firsts = None if live.firsts_there is None else live.firsts_there[start:stop]
        offsets = live.offsets[start : stop + 1]
        offsets = offsets - first if first else offsets
        spans = Spans(offsets, len(hidden), int(lengths.max(initial=0)), firsts)
        return reader.forward_packed(self.model.finish(hidden), spans)

    def select(self, live: CudaTexts, rows: Integers) -> CudaTexts:
        """Keep some texts: one gather of their tokens."""
        firsts = None if live.firsts is None else live.firsts[rows]
        (tokens,), place = self._place(live.lengths[rows], firsts, token_positions(live.lengths, rows))
        return place(live.hidden.index_select(0, tokens))

    def concat(self, lives: Sequence[CudaTexts]) -> CudaTexts:
        """Put live texts one after another."""
        lengths = np.concatenate([live.lengths for live in lives])
        _, place = self._place(lengths, joined([live.firsts for live in lives]))
        return place(torch.cat([live.hidden for live in lives]))

    def _place(
        self, lengths: Integers, firsts: Integers | None, *rows: Integers
    ) -> tuple[list[Tensor], Callable[[Tensor], CudaTexts]]:
        """Send rows to the device, and with them where texts of these lengths lie; the latter awaits hidden states."""
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        longest = int(lengths.max(initial=0))
        pairs = [] if firsts is None else [firsts]
        if not self._in_tiles(lengths, longest):
            sent, tiles = self.staging.upload([*rows, *pairs, offsets]), None
        else:
            plan = plan_tiles(lengths)
            *sent, source, text, slot = self.staging.upload([*rows, *pairs, offsets, plan.source, plan.text, plan.slot])
            tiles = Tiles(plan.tile, source, slot, tile_bias(text, self.model.dtype))
        there = sent[len(rows)] if pairs else None
        return sent[: len(rows)], lambda hidden: CudaTexts(hidden, lengths, sent[-1], longest, tiles, firsts, there)

    def _in_tiles(self, lengths: Integers, longest: int) -> bool:
        """Whether attention of a batch runs in tiles."""
        if self.options.attention != "auto":
            return self.options.attention == "tiles"
        num_tokens = int(lengths.sum())
        for_varlen = num_tokens > self.options.graph_tokens and num_tokens >= self.options.varlen_from * len(lengths)
        return longest <= TILE and not (for_varlen and self.varlen is not None)

    def _run(self, live: CudaTexts, number: int, before: Tensor) -> Tensor:
        """Run a packed layer (from 1) on all tokens, whose hidden states are a prefix of `before`."""
        layer, tiles, hidden = self.layers[number - 1], live.tiles, live.hidden
        if not len(hidden):
            return hidden
        if tiles is not None:
            replayed = None
            if self.graphs is not None:
                replayed = self.graphs(number, before, hidden, TextPlaces(tiles, live.offsets, live.firsts_there))
            return layer.in_tiles(hidden, tiles) if replayed is None else replayed
        qkv, num_heads = layer.qkv(hidden), layer.packed.num_heads
        if self.varlen is None or self.options.attention == "runs":
            mixed = attend_runs(qkv, Layout(live.lengths), num_heads, layer.packed.mixer)
        else:
            query, key, value = qkv.view(len(qkv), 3, num_heads, -1).unbind(1)
            longest = live.longest
            mixed = self.varlen(query, key, value, live.offsets, live.offsets, longest, longest).flatten(1)
        return layer.finish(mixed, hidden, layer.weights)


def _find_varlen(model: GeepForSequenceClassification, num_heads: int) -> Varlen | None:
    """PyTorch's variable-length attention, if it is there and takes this model's heads."""
    if model.device.type != "cuda" or model.dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        logger.info("torch %s has no varlen_attn; texts above %d tokens run by length.", torch.__version__, TILE)
        return None
    # Only the seven positional arguments: the others have changed with every release (2.10 to 2.13).
    head = model.config.hidden_size // num_heads
    query = torch.zeros(2, num_heads, head, dtype=model.dtype, device=model.device)
    offsets = torch.tensor([0, 2], dtype=torch.int32, device=model.device)
    try:
        varlen_attn(query, query, query, offsets, offsets, 2, 2)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        logger.info("varlen_attn does not run here (%s); texts above %d tokens run by length.", error, TILE)
        return None
    return varlen_attn


def _may_compile(asked: bool | None, device: torch.device) -> bool:
    """Whether to compile: as asked, else on CUDA where Triton is there."""
    if device.type != "cuda" or asked is False:
        return bool(asked)
    if importlib.util.find_spec("triton") is not None:
        return True
    if asked:
        raise ImportError("compile=True needs Triton, which is not installed: pip install triton, or compile=False.")
    logger.warning("Triton is not installed, so layers run uncompiled: pip install triton.")
    return False
