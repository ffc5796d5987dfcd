"""CUDA backend: the packed staircase on a GPU, with nothing that waits for the device and few launches.

Texts lie packed, as in `geep.backends.packed`, and a layer runs on a prefix of them. What differs:

- attention on short texts in tiles (`geep.backends.tiles`), on longer ones by PyTorch's variable-length flash kernel;
- what follows attention is one function, compiled once and used by all layers, whose weights are arguments;
- small batches replay CUDA graphs (`geep.backends.graphs`);
- token ids and all that is derived from lengths reach the device in one copy (`geep.backends.staging`) and stay there;
- texts that end at a layer whose exit reads only [CLS] run that layer for [CLS] alone.

Not yet run on a GPU: tests run the same code on CPU tensors. Every bound in `CudaOptions` is arithmetic, not
measurement; `benchmarks/gpu.py` measures them.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from geep.backends.graphs import LayerGraphs
from geep.backends.int8 import ActivationRanges
from geep.backends.packed import PackedBackend, embed, joined, only_first_tokens_end, position_ids
from geep.backends.packed_layer import PackedLayer, attend_first, attend_runs, length_runs, packed_layers
from geep.backends.protocol import FLOAT_DTYPES, Integers, TokenBatch, token_positions
from geep.backends.staging import Staging
from geep.backends.tiles import TILE, Tiles, attend_tiles, plan_tiles, tile_bias
from geep.modeling import GeepForSequenceClassification, family_of

logger = logging.getLogger(__name__)

# query, key, value (num_tokens, num_heads, head), offsets of queries and of keys, longest of both -> as query
Varlen = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """How the backend runs; every choice gives the same answers up to rounding.

    Attributes:
        attention: "tiles" (texts up to 128 tokens), "varlen" (half precision on CUDA only) or "runs" (one call for
            each run of equal lengths). "auto": tiles where no text of the batch is longer than a tile, else varlen,
            or runs where there is no varlen. Where tiles and varlen really cross is not yet measured.
        compile: Whether to compile what follows attention. None: on CUDA.
        graphs: Whether small batches in tiles replay CUDA graphs. None: on CUDA.
        graph_tokens: Largest batch for graphs. A layer of BERT-base takes 23 ns a token on an H100 and ten launches
            take some 80 µs, so up to 4,096 tokens launching may take longer than running (both estimated).
        record_after: Uses of a layer at a size before its graph is recorded.
        first_tokens_from: Tokens of ending texts from which running [CLS] alone pays: its launches cost more than a
            layer on fewer tokens takes.
    """

    attention: Literal["auto", "tiles", "varlen", "runs"] = "auto"
    compile: bool | None = None
    graphs: bool | None = None
    graph_tokens: int = 4096
    record_after: int = 1000
    first_tokens_from: int = 4096


class LayerWeights(NamedTuple):
    """Weights of a layer, each matrix (out, in) before its bias; norms are scale and shift."""

    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    attention_norm: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    output_norm: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, layer: PackedLayer) -> Self:
        """Take the tensors of a packed layer."""
        norms = [(norm.weight, norm.bias) for norm in (layer.attention_norm, layer.output_norm)]
        return cls(layer.qkv, layer.out, norms[0], layer.up, layer.down, norms[1])


# mixed values (rows, hidden), the layer's input (rows, hidden), weights -> the layer's output (rows, hidden)
Finish = Callable[[Tensor, Tensor, LayerWeights], Tensor]


def make_finish(activation: Callable[[Tensor], Tensor], eps: float) -> Finish:
    """Make the function of all that follows attention in a post-norm layer."""

    def finish(mixed: Tensor, hidden: Tensor, weights: LayerWeights) -> Tensor:
        size = hidden.shape[1:]
        hidden = F.layer_norm(F.linear(mixed, *weights.out) + hidden, size, *weights.attention_norm, eps)
        wide = activation(F.linear(hidden, *weights.up))
        return F.layer_norm(F.linear(wide, *weights.down) + hidden, size, *weights.output_norm, eps)

    return finish


def compiled(finish: Finish, layers: Sequence[LayerWeights], **options: Any) -> Finish:
    """Compile for any number of rows; weights are arguments, so all layers share what is compiled.

    Args:
        finish: The function.
        layers: All weights it will see. Their sizes are marked as fixed, so that only the rows vary.
        **options: Passed on to `torch.compile`.
    """
    for weights in layers:
        for pair in weights:
            for tensor in pair:
                torch._dynamo.mark_static(tensor)
    return torch.compile(finish, dynamic=True, **options)


@dataclass(frozen=True, slots=True)
class CudaTexts:
    """Live texts.

    Of a text that has ended (see `Backend.advance`) only the first token may be left; its length is then 1.

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

    model: GeepForSequenceClassification
    options: CudaOptions
    layers: tuple[LayerWeights, ...]
    num_heads: int
    finish: Finish
    varlen: Varlen | None
    staging: Staging
    graphs: LayerGraphs | None

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Whether the encoder's layer is the plain post-norm one."""
        return PackedBackend.supports(config)

    @classmethod
    def dtypes(cls, device_type: str) -> tuple[str, ...]:
        """Dtypes it runs on a kind of device, its default first."""
        return FLOAT_DTYPES.get(device_type, ())

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
        layers = tuple(map(LayerWeights.of, packed))
        num_heads, device = packed[0].num_heads, model.device
        varlen = _find_varlen(model, num_heads)
        if options.attention == "varlen" and varlen is None:
            raise ValueError(
                f"attention='varlen' needs float16 or bfloat16 on a CUDA device and torch.nn.attention.varlen, found "
                f"{model.dtype} on {device}, torch {torch.__version__}; use attention='auto'."
            )
        finish = make_finish(packed[0].activation, packed[0].output_norm.eps)
        if _may_compile(options.compile, device):
            finish = compiled(finish, layers)
        graphs = None
        if device.type == "cuda" if options.graphs is None else options.graphs:
            graphs = LayerGraphs(
                lambda layer, hidden, tiles: _tiled_layer(layers[layer - 1], hidden, tiles, num_heads, finish),
                width=model.config.hidden_size,
                dtype=model.dtype,
                device=device,
                max_tokens=options.graph_tokens,
                record_after=options.record_after,
            )
        return cls(model, options, layers, num_heads, finish, varlen, Staging(device), graphs)

    def start(self, batch: TokenBatch) -> CudaTexts:
        """Embed texts with the encoder's own embedding module, every token at its position in its text."""
        encoder = self.model.encoder
        rows = {"input_ids": batch.input_ids, "position_ids": position_ids(batch, encoder.config)}
        if batch.token_type_ids is not None:
            rows["token_type_ids"] = batch.token_type_ids
        found, place = self._place(batch.lengths, batch.firsts(self.model.config.separator_id), *rows.values())
        inputs = {name: row[None] for name, row in zip(rows, found, strict=True)}
        # Always given: without them Hugging Face's module would look them up by position, and would want int64.
        inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
        if not family_of(encoder.config).has_token_type_ids:
            del inputs["token_type_ids"]
        return place(embed(encoder, inputs))

    def advance(self, live: CudaTexts, layer: int, num_texts: int, *, continuing: int | None = None) -> CudaTexts:
        """Run a layer on a prefix of the texts; the prefix is a view."""
        before, live = live.hidden, live.prefix(num_texts)
        if continuing is None or not self._pays_first_tokens(live, layer, continuing):
            return replace(live, hidden=self._run(live, layer, before))
        # Those that end: their first tokens only.
        weights, ending = self.layers[layer - 1], live.lengths[continuing:]
        starts = live.offsets[continuing:-1]
        first = live.hidden.index_select(0, starts)
        sizes = live.offsets[continuing:].diff()
        mixed = attend_first(
            first,
            weights.qkv,
            self.num_heads,
            lambda q, scale: _mix_padded(q, scale, live.hidden, starts, sizes, ending),
        )
        hidden = self.finish(mixed, first, weights)
        going = live.prefix(continuing)
        if len(going.hidden):
            hidden = torch.cat([self._run(going, layer, before), hidden])
        ends = live.offsets[continuing] + torch.arange(1, len(ending) + 1, dtype=torch.int32, device=hidden.device)
        return replace(
            going,
            hidden=hidden,
            lengths=np.concatenate([going.lengths, np.ones_like(ending)]),
            offsets=torch.cat([going.offsets, ends]),
            firsts=live.firsts,
            firsts_there=live.firsts_there,
        )

    def exit_logits(
        self, live: CudaTexts, layer: int, start: int, stop: int, *, head: nn.Module | None = None
    ) -> Tensor:
        """Run the classifier of a layer, or another head, on a range of texts; the range is a view."""
        first = int(live.lengths[:start].sum())
        lengths = live.lengths[start:stop]
        hidden = live.hidden[first : first + int(lengths.sum())]
        reader: Any = self.model.head_at(layer) if head is None else head
        firsts = None if live.firsts_there is None else live.firsts_there[start:stop]
        offsets = live.offsets[start : stop + 1] - first
        return reader.forward_packed(hidden, offsets, int(lengths.max(initial=0)), firsts)

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
        auto = self.options.attention == "auto"
        if not (longest <= TILE if auto else self.options.attention == "tiles"):
            sent, tiles = self.staging.upload([*rows, *pairs, offsets]), None
        else:
            plan = plan_tiles(lengths)
            *sent, source, text, slot = self.staging.upload([*rows, *pairs, offsets, plan.source, plan.text, plan.slot])
            tiles = Tiles(plan.tile, source, slot, tile_bias(text, self.model.dtype))
        there = sent[len(rows)] if pairs else None
        return sent[: len(rows)], lambda hidden: CudaTexts(hidden, lengths, sent[-1], longest, tiles, firsts, there)

    def _run(self, live: CudaTexts, layer: int, before: Tensor) -> Tensor:
        """Run a layer on all tokens, whose hidden states are a prefix of `before`."""
        weights, tiles = self.layers[layer - 1], live.tiles
        if not len(live.hidden):
            return live.hidden
        if tiles is not None:
            replayed = None if self.graphs is None else self.graphs(layer, before, live.hidden, tiles)
            return (
                _tiled_layer(weights, live.hidden, tiles, self.num_heads, self.finish) if replayed is None else replayed
            )
        qkv = F.linear(live.hidden, *weights.qkv)
        if self.varlen is None or self.options.attention == "runs":
            mixed = attend_runs(qkv, length_runs(live.lengths), self.num_heads)
        else:
            query, key, value = qkv.view(len(qkv), 3, self.num_heads, -1).unbind(1)
            longest = live.longest
            mixed = self.varlen(query, key, value, live.offsets, live.offsets, longest, longest).flatten(1)
        return self.finish(mixed, live.hidden, weights)

    def _pays_first_tokens(self, live: CudaTexts, layer: int, continuing: int) -> bool:
        """Whether to run a layer for the first tokens of the texts that end there."""
        if not only_first_tokens_end(self.model, layer, len(live.lengths), continuing):
            return False
        ending, going = live.lengths[continuing:], live.lengths[:continuing]
        # The tokens of those that go on are copied once more: about a twentieth of a layer's time.
        enough = int(ending.sum()) >= self.options.first_tokens_from + int(going.sum()) // 16
        return enough and bool(ending.all())  # a text without tokens has no first one: the usual way knows how


def _tiled_layer(weights: LayerWeights, hidden: Tensor, tiles: Tiles, num_heads: int, finish: Finish) -> Tensor:
    return finish(attend_tiles(F.linear(hidden, *weights.qkv), tiles, num_heads), hidden, weights)


def _mix_padded(
    query: Tensor, scale: float, hidden: Tensor, starts: Tensor, sizes: Tensor, lengths: Integers
) -> Tensor:
    """The `mix` of `attend_first` for texts at `starts`; padded in groups whose lengths lie within a factor of two."""
    out = torch.empty_like(query)
    steps = np.flatnonzero(np.diff(np.ceil(np.log2(lengths)))) + 1
    borders = [0, *steps.tolist(), len(lengths)]
    for begin, end in zip(borders, borders[1:], strict=False):
        # Kernels with a mask want its rows aligned.
        longest = -(-int(lengths[begin:end].max()) // 8) * 8
        column = torch.arange(longest, dtype=starts.dtype, device=starts.device)
        token = (starts[begin:end, None] + column).clamp_(max=len(hidden) - 1)
        tokens = hidden.index_select(0, token.flatten()).view(end - begin, 1, longest, -1)
        inside = (column < sizes[begin:end, None])[:, None, None]
        mixed = F.scaled_dot_product_attention(query[begin:end, None], tokens, tokens, attn_mask=inside, scale=scale)
        out[begin:end] = mixed[:, 0]
    return out


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
