"""What the CUDA backend reaches on a GPU, piece by piece, beside the peak that the same card shows for matrix products.

Measured, on an encoder of BERT-base's shape with random weights (or on --model), in bfloat16, most important first:

- staircase: time of texts of mixed predicted depth (drawn, mean about four of twelve) against full depth, and how much
  of the saved layers arrives as saved time: calls of 1 to 65,536 texts, small ones without graphs, too, exits "cls"
  and "conv"; at one size also where about a third of those asked go on (on_miss="continue");
- texts: texts/s at full depth from token ids and from raw texts, and of the tokenizer alone;
- full_depth: full model on texts of 128 tokens, and its share of the peak;
- prediction: texts/s of the exit table, single texts and pairs;
- layer: ns a token for one layer, plain, compiled, and replayed from a graph, at several numbers of tokens;
- attention: ns a token for one layer with attention in tiles, varlen and runs, at several mean lengths;
- gemm: TFLOP/s of a large product (the peak) and of the layers' own products at several numbers of tokens;
- pipeline: texts/s of Hugging Face's pipeline.

Not measured: accuracy (weights are random), energy, several GPUs, calls that come at the same time.

A device may be at hand for minutes only: each line is written as soon as it is measured, and what does not begin within
--seconds is left out and named. The tests run it at toy sizes on a CPU. The command

    python benchmarks/gpu.py

replaces what it measures in benchmarks/results/gpu-<device>.jsonl, one line a measurement.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hash_table import predict_case
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from geep.backends import CudaBackend, CudaOptions, TokenBatch
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.evaluation import machine
from geep.modeling import GeepForSequenceClassification

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
STOP = ExitSettings(speed=0.5, on_miss="stop")


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are for a data-centre GPU."""

    gemm: int = 8192
    tokens: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 11264, 22528, 45056)
    mean_lengths: tuple[int, ...] = (16, 25, 64, 128, 256)
    attention_tokens: int = 22528
    texts: tuple[int, ...] = (1, 8, 64, 512, 4096, 65536)
    small_texts: int = 512
    full_texts: int = 4096
    raw_texts: int = 32768
    predicted_texts: int = 65536
    pipeline_texts: int = 2048
    pipeline_batches: tuple[int, ...] = (128, 512)
    rounds: int = 5
    seconds: float = 0.2


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    engine: Engine
    sizes: Sizes

    @property
    def model(self) -> Any:
        """The model, on its device."""
        return self.engine.model

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.engine.model.device

    @property
    def width(self) -> int:
        """Width of its hidden states."""
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Its encoder layers."""
        return int(self.model.config.num_hidden_layers)

    def backend(self, **options: Any) -> CudaBackend:
        """Another backend on the same weights."""
        return CudaBackend.build(self.model, dtype=self.engine.deployment.dtype, options=CudaOptions(**options))

    @cached_property
    def with_graphs(self) -> CudaBackend:
        """As built by default on a GPU. Others are made of it, so that all share what was compiled and recorded."""
        return self.backend(graphs=True)

    @cached_property
    def without_graphs(self) -> CudaBackend:
        """The same without graphs."""
        return replace(self.with_graphs, graphs=None)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median wall-clock seconds of one call, after warm-up; rounds of short calls hold several.

        All rounds together take about `Sizes.seconds`, and no less than a call each.
        """
        begin = time.perf_counter()
        for _ in range(5):  # graphs are recorded at the third use
            work()
            self.wait()
            if time.perf_counter() - begin > 5 * self.sizes.seconds:
                break
        inner, times = 1, []
        for number in range(-1, self.sizes.rounds):  # one more, which says how many calls fit into a round
            self.wait()
            begin = time.perf_counter()
            for _ in range(inner):
                work()
            self.wait()
            times.append((time.perf_counter() - begin) / inner)
            if number == -1:
                inner = max(1, int(self.sizes.seconds / self.sizes.rounds / times.pop()))
        return statistics.median(times)

    def wait(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def batch(self, lengths: np.ndarray, seed: int = 0) -> TokenBatch:
        """Random token ids of texts of these lengths."""
        low, high = 1000 if len(self.engine.tokenizer) > 2000 else 5, len(self.engine.tokenizer)
        ids = np.random.default_rng(seed).integers(low, high, int(lengths.sum()))
        return TokenBatch(ids, None, lengths.astype(np.int64))

    def on(self, backend: CudaBackend) -> Engine:
        """The engine on another backend."""
        engine = self.engine.replace()
        engine.course = replace(engine.course, backend=backend)
        return engine

    def flops(self, lengths: np.ndarray) -> float:
        """Useful operations of one layer on texts of these lengths: products, scores and means."""
        intermediate = self.backend(compile=False, graphs=False).layers[0].weights.up[0].shape[0]
        per_token = 8 * self.width**2 + 4 * self.width * intermediate
        return float(per_token * lengths.sum() + 4 * self.width * (lengths.astype(float) ** 2).sum())


def draw_lengths(mean: int, *, num_texts: int, longest: int, seed: int = 0) -> np.ndarray:
    """Lengths of texts: skewed as sentences are (gamma, shape 4), at least 3 tokens."""
    drawn = np.random.default_rng(seed).gamma(4.0, mean / 4.0, num_texts)
    return np.clip(np.rint(drawn), 3, longest).astype(np.int64)


def draw_depths(depths: tuple[int, ...], *, num_texts: int, seed: int = 0) -> np.ndarray:
    """Depths that fall off geometrically, a third of the full depth on average: what an easy data set predicts."""
    weights = (1 - 3 / depths[-1]) ** np.arange(len(depths)) if depths[-1] > 3 else np.ones(len(depths))
    return np.random.default_rng(seed).choice(np.array(depths), num_texts, p=weights / weights.sum())


# --------------------------------------------------------------------------------------------------------------------
# Measurements
# --------------------------------------------------------------------------------------------------------------------


def gemm(bench: Bench) -> Iterator[Row]:
    """TFLOP/s of x @ w, w (out, in): a large square product, and the layers' products."""
    size, width = bench.sizes.gemm, bench.width
    shapes = [(size, size, size)]
    shapes += [
        (m, n, k) for m in bench.sizes.tokens for n, k in ((3 * width, width), (4 * width, width), (width, 4 * width))
    ]
    for m, n, k in shapes:
        x = torch.randn(m, k, device=bench.device, dtype=bench.model.dtype)
        w = torch.randn(n, k, device=bench.device, dtype=bench.model.dtype)
        seconds = bench.seconds(lambda x=x, w=w: torch.nn.functional.linear(x, w))
        yield {"m": m, "n": n, "k": k, "tflops": 2 * m * n * k / seconds / 1e12}


def peak_flops(bench: Bench) -> float:
    """Operations per second of the large product."""
    (row,) = gemm(replace(bench, sizes=replace(bench.sizes, tokens=())))
    return float(1e12 * row["tflops"])


def full_depth(bench: Bench) -> Iterator[Row]:
    """The full model on texts of 128 tokens, from token ids to logits on the host."""
    lengths = np.full(bench.sizes.full_texts, min(128, bench.engine.deployment.max_length))
    batch, depths = bench.batch(lengths), np.full(len(lengths), bench.num_layers)
    seconds = bench.seconds(lambda: bench.engine.run_tokens(batch, settings=STOP, exit_layers=depths))
    peak = peak_flops(bench)
    useful = bench.flops(lengths) * bench.num_layers
    yield {
        "texts": len(lengths),
        "tokens_per_text": int(lengths[0]),
        "seconds": seconds,
        "texts_per_second": len(lengths) / seconds,
        "tokens_per_second": float(lengths.sum()) / seconds,
        "peak_tflops": peak / 1e12,
        "share_of_peak": useful / seconds / peak,
    }


def layer(bench: Bench) -> Iterator[Row]:
    """One layer on texts of about 25 tokens."""
    variants = {
        "plain": bench.backend(compile=False, graphs=False),
        "compiled": bench.without_graphs,
        # Larger than by default: to see up to where they pay.
        "graph": bench.backend(graphs=True, graph_tokens=24576),
    }
    for tokens in bench.sizes.tokens:
        lengths = draw_lengths(25, num_texts=2 * tokens // 25 + 1, longest=100)
        lengths = np.sort(lengths[np.cumsum(lengths) <= tokens])
        for name, backend in variants.items():
            if name != "graph" or tokens <= backend.options.graph_tokens:
                yield {"variant": name, **_layer_time(bench, backend, lengths)}


def attention(bench: Bench) -> Iterator[Row]:
    """One layer, with attention in each way that takes the lengths."""
    plain, longest = bench.without_graphs, bench.engine.deployment.max_length
    for mean in bench.sizes.mean_lengths:
        # The same texts for all: where the mean is near a tile, lengths are cut at it; above it tiles are left out.
        top = 128 if mean <= 128 else longest
        lengths = draw_lengths(mean, num_texts=2 * bench.sizes.attention_tokens // mean, longest=min(top, longest))
        lengths = np.sort(lengths[np.cumsum(lengths) <= bench.sizes.attention_tokens])
        for kind in ("tiles", "varlen", "runs"):
            if kind == "varlen" and plain.varlen is None:
                yield {"attention": kind, "mean_length": mean, "left_out": "there is no varlen here"}
            elif kind != "tiles" or top <= 128:
                backend = replace(plain, options=replace(plain.options, attention=kind))
                yield {"attention": kind, "mean_length": mean, **_layer_time(bench, backend, lengths)}


def _layer_time(bench: Bench, backend: CudaBackend, lengths: np.ndarray) -> Row:
    """Time of a layer, as a share of a walk through all layers."""

    def walk() -> None:
        state = live
        for number in range(1, bench.num_layers + 1):
            state = backend.advance(state, number, len(lengths))

    with torch.inference_mode():
        live = backend.start(bench.batch(lengths))
        seconds = bench.seconds(walk) / bench.num_layers
    tokens = int(lengths.sum())
    return {"texts": len(lengths), "tokens": tokens, "seconds": seconds, "ns_per_token": 1e9 * seconds / tokens}


def staircase(bench: Bench) -> Iterator[Row]:
    """Mixed depths against full depth, from token ids to logits on the host."""
    models = {head: _with_exits(bench, head) for head in ("conv", "cls")}
    for num_texts in bench.sizes.texts:
        is_small = num_texts <= bench.sizes.small_texts
        lengths = draw_lengths(25, num_texts=num_texts, longest=min(100, bench.engine.deployment.max_length))
        batch = bench.batch(lengths)
        for graphs in (True, False) if is_small else (True,):
            backend = bench.with_graphs if graphs else bench.without_graphs
            # No exit is asked on the way to full depth, so it is the same for all.
            full = np.full(num_texts, bench.num_layers)
            alone = bench.on(backend)
            full_seconds = bench.seconds(
                lambda e=alone, b=batch, at=full: e.run_tokens(b, settings=STOP, exit_layers=at)
            )
            for head, model in models.items():
                engine = bench.on(replace(backend, model=model))
                choices = [STOP]
                if num_texts == bench.sizes.small_texts:
                    choices.append(_a_third_goes_on(engine, batch))
                for chosen in choices:
                    about = {"head": head, "graphs": graphs, "on_miss": chosen.on_miss, "texts": num_texts}
                    yield about | _staircase_time(bench, engine, batch, chosen, full_seconds)


def _with_exits(bench: Bench, head: str) -> GeepForSequenceClassification:
    """The same encoder with fresh exits of a kind."""
    model = GeepForSequenceClassification.from_encoder(
        bench.model.encoder, num_labels=2, exit_head=head, exit_layers=list(bench.engine.depths[:-1])
    )
    return model.to(bench.device, bench.model.dtype).eval()


def _a_third_goes_on(engine: Engine, batch: TokenBatch) -> ExitSettings:
    """Settings under which about a third of all answers are not certain enough."""
    logits = engine.exit_logits(batch)[:-1]
    unsure = [ExitSettings().uncertainty(part, 1, multi_label=False) for part in logits]
    return ExitSettings(speed=float(torch.stack(unsure).quantile(2 / 3).clamp(0, 1)))


def _staircase_time(bench: Bench, engine: Engine, batch: TokenBatch, chosen: ExitSettings, full_seconds: float) -> Row:
    """Time of drawn depths, beside that of full depth."""
    lengths, drawn = batch.lengths, draw_depths(engine.depths, num_texts=len(batch))
    run = engine.run_tokens(batch, settings=chosen, exit_layers=drawn).exit_layers
    seconds = bench.seconds(lambda: engine.run_tokens(batch, settings=chosen, exit_layers=drawn))
    layer_speedup = float(bench.num_layers * lengths.sum() / (run * lengths).sum())
    return {
        "tokens": int(lengths.sum()),
        "mean_exit_layer": float(run.mean()),
        "full_seconds": full_seconds,
        "mixed_seconds": seconds,
        "layer_speedup": layer_speedup,
        "speedup": full_seconds / seconds,
        "realised": full_seconds / seconds / layer_speedup,
        "texts_per_second": len(batch) / seconds,
    }


def texts(bench: Bench) -> Iterator[Row]:
    """Texts a second at full depth from token ids and from raw texts, and of the tokenizer."""
    engine, raw = bench.engine, _raw_texts(bench, bench.sizes.raw_texts)
    batch, full = engine.tokenize(raw).batch, np.full(len(raw), bench.num_layers)
    runs: dict[str, Callable[[], object]] = {
        "token_ids": lambda: engine.run_tokens(batch, settings=STOP, exit_layers=full),
        "raw_texts": lambda: engine.predict(raw, speed=0),
        "tokenizer": lambda: engine.tokenize(raw),
    }
    for name, work in runs.items():
        seconds = bench.seconds(work)
        yield {"run": name, "texts": len(raw), "seconds": seconds, "texts_per_second": len(raw) / seconds}


def hugging_face(bench: Bench) -> Iterator[Row]:
    """Texts a second of Hugging Face's pipeline at full depth."""
    tokenizer, raw = bench.engine.tokenizer, _raw_texts(bench, bench.sizes.pipeline_texts)
    call: Any = pipeline("text-classification", model=bench.model, tokenizer=tokenizer, device=bench.device)  # type: ignore[call-overload]
    longest = bench.engine.deployment.max_length

    def run(size: int) -> list[Any]:
        # A generator, not a list: the pipeline then keeps its data loader busy.
        return list(call((text for text in raw), batch_size=size, truncation=True, max_length=longest))

    for size in bench.sizes.pipeline_batches:
        seconds = bench.seconds(lambda size=size: run(size))
        yield {"batch_size": size, "texts": len(raw), "seconds": seconds, "texts_per_second": len(raw) / seconds}


def _raw_texts(bench: Bench, num_texts: int) -> list[str]:
    """Texts of about 25 words that the tokenizer knows."""
    lengths = draw_lengths(25, num_texts=num_texts, longest=min(100, bench.engine.deployment.max_length))
    vocabulary = [word for word in bench.engine.tokenizer.get_vocab() if word.isascii() and word.isalnum()]
    words = np.random.default_rng(0).choice(np.array(sorted(vocabulary)), int(lengths.sum()))
    ends = np.cumsum(lengths)
    return [" ".join(words[end - length : end]) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]


def prediction(bench: Bench) -> Iterator[Row]:
    """Texts a second of a made-up exit table, by tensor operations and, on a GPU, by one kernel."""
    for pairs in (False, True):
        case = predict_case(bench.device, bench.sizes.predicted_texts, pairs=pairs)
        for name, method in case.methods.items():
            seconds = bench.seconds(method)
            yield {
                "way": name,
                "pairs": pairs,
                "texts": case.items,
                "tokens": case.about["num_tokens"],
                "seconds": seconds,
                "texts_per_second": case.items / seconds,
            }


@dataclass(frozen=True)
class Kind:
    """A measurement, and what of its lines the summary says: fields that name a line, and figures."""

    measure: Callable[[Bench], Iterator[Row]]
    names: tuple[str, ...]
    figures: tuple[str, ...]

    def summary(self, rows: Sequence[Row]) -> str:
        """All lines in one."""
        return "; ".join(
            " ".join(str(row[name]) for name in self.names)
            + ": "
            + ", ".join(f"{name} {row[name]:.4g}" for name in self.figures if name in row)
            for row in rows
        )


# In the order in which they are run: first what decides about code.
KINDS = {
    "staircase": Kind(staircase, ("head", "graphs", "on_miss", "texts"), ("full_seconds", "mixed_seconds", "realised")),
    "texts": Kind(texts, ("run",), ("texts_per_second",)),
    "full_depth": Kind(full_depth, ("texts",), ("texts_per_second", "share_of_peak")),
    "prediction": Kind(prediction, ("way", "pairs"), ("texts_per_second",)),
    "layer": Kind(layer, ("variant", "tokens"), ("ns_per_token",)),
    "attention": Kind(attention, ("attention", "mean_length"), ("ns_per_token",)),
    "gemm": Kind(gemm, ("m", "n", "k"), ("tflops",)),
    "pipeline": Kind(hugging_face, ("batch_size",), ("texts_per_second",)),
}


@dataclass
class Results:
    """A file of lines, each written when it is measured; older ones of the same kind and encoder are replaced."""

    path: Path
    about: dict[str, Any]
    rows: dict[str, list[Row]] = field(default_factory=dict)

    def add(self, kind: str, row: Row) -> None:
        """Keep a line."""
        if kind not in self.rows:
            self.rows[kind] = []
            self.path.parent.mkdir(exist_ok=True)
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            old = (kind, self.about["encoder"])
            kept = [line for line in lines if (json.loads(line)["kind"], json.loads(line)["encoder"]) != old]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.rows[kind].append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **row, **self.about}) + "\n")


def measure_all(bench: Bench, chosen: Sequence[str], results: Results, *, seconds: float) -> None:
    """Measure kinds in order, print each line, and a summary; what does not begin in time is left out and named."""
    end, out = time.perf_counter() + seconds, []
    for kind in chosen:
        if time.perf_counter() >= end:
            out.append(f"{kind}: left out, {seconds:g} seconds are over")
            continue
        begin = time.perf_counter()
        for row in KINDS[kind].measure(bench):
            results.add(kind, row)
            print(json.dumps({"kind": kind, **row}), flush=True)
            if time.perf_counter() >= end:
                out.append(f"{kind}: what may have followed was left out, {seconds:g} seconds are over")
                break
        took = time.perf_counter() - begin
        out.append(f"{kind} ({took:.0f} s): {KINDS[kind].summary(results.rows.get(kind, []))}")
    print("\n".join(out), flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Set-up
# --------------------------------------------------------------------------------------------------------------------


def random_model(**changes: Any) -> tuple[GeepForSequenceClassification, PreTrainedTokenizerFast]:
    """An encoder of BERT-base's shape with random weights, an exit after every layer, and words w0, w1, … to read."""
    config = AutoConfig.for_model("bert", **changes)
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config, add_pooling_layer=False)
    model = GeepForSequenceClassification.from_encoder(
        encoder, num_labels=2, exit_head="cls", exit_layers=list(range(1, config.num_hidden_layers))
    )
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    words = [*special, *(f"w{i}" for i in range(config.vocab_size - len(special)))]
    tokens = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokens.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        model_max_length=config.max_position_embeddings,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    return model, tokenizer


def real_model(path: str) -> tuple[GeepForSequenceClassification, Any]:
    """A pretrained encoder with fresh exits."""
    layers = AutoConfig.from_pretrained(path).num_hidden_layers
    model = GeepForSequenceClassification.from_encoder(
        path, num_labels=2, exit_head="cls", exit_layers=list(range(1, layers))
    )
    return model, AutoTokenizer.from_pretrained(path)


def main() -> int:
    """Measure what is asked for; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder or id of an encoder of a packed family; default: BERT-base, random weights"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=300, help="nothing begins after them; default: 300")
    parser.add_argument("--only", help=f"measurements, by commas; default: {','.join(KINDS)}")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(KINDS)
    if unknown := sorted(set(chosen) - set(KINDS)):
        print(f"Unknown measurements {unknown}; known: {list(KINDS)}.", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py measures the CUDA backend and found no CUDA device. It needs an NVIDIA GPU that runs "
            f"bfloat16 and a CUDA build of torch (found torch {torch.__version__}). On a CPU run `make bench`.",
            file=sys.stderr,
        )
        return 2
    transformers.logging.set_verbosity_error()
    model, tokenizer = random_model() if args.model is None else real_model(args.model)
    config = EngineConfig(device="cuda", dtype=args.dtype, backend="cuda")
    bench = Bench(Engine(model, tokenizer, config=config), Sizes())
    about = {"encoder": "random 12x768" if args.model is None else Path(args.model).name, **machine(bench.engine)}
    path = RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', about['device'].lower()).strip('-')}.jsonl"
    measure_all(bench, chosen, Results(path, about), seconds=args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
