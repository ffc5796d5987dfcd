"""What the CUDA backend reaches on a GPU, piece by piece, beside the peak that the same card shows for matrix products.

Measured, on an encoder of BERT-base's shape with random weights (or on --model), in bfloat16:

- gemm: TFLOP/s of a large product (the peak) and of the layers' own products at several numbers of tokens;
- full_depth: full model on texts of 128 tokens, and its share of that peak;
- layer: ns a token for one layer, plain, compiled, and replayed from a graph, at several numbers of tokens;
- attention: ns a token for one layer with attention in tiles, varlen and runs, at several mean lengths;
- staircase: time of texts of mixed predicted depth (drawn, mean about four of twelve, on_miss="stop") against full
  depth, and how much of the saved layers arrives as saved time; with and without running [CLS] alone at the end;
- texts: texts/s from token ids, from raw texts, and of Hugging Face's pipeline at its best batch size.

Not measured: accuracy (weights are random), energy, several GPUs, online latency.

The tests run it at toy sizes on a CPU. The command

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from geep.backends import CudaBackend, CudaOptions, TokenBatch
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.evaluation import machine
from geep.modeling import GeepForSequenceClassification

RESULTS = Path(__file__).parent / "results"
STOP = ExitSettings(speed=0.5, on_miss="stop")


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are for a data-centre GPU."""

    gemm: int = 8192
    tokens: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 5632, 11264, 22528, 45056)
    mean_lengths: tuple[int, ...] = (16, 25, 64, 128, 256)
    attention_tokens: int = 22528
    texts: tuple[int, ...] = (64, 4096, 65536)
    full_texts: int = 4096
    raw_texts: int = 16384
    pipeline_texts: int = 4096
    pipeline_batches: tuple[int, ...] = (32, 128, 512)
    rounds: int = 7
    inner: int = 10


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

    def seconds(self, work: Callable[[], object], *, inner: int = 1) -> float:
        """Median wall-clock seconds of one call, after warm-up; `inner` calls are queued before the wait."""
        for _ in range(3):
            work()
        times = []
        for _ in range(self.sizes.rounds):
            self.wait()
            begin = time.perf_counter()
            for _ in range(inner):
                work()
            self.wait()
            times.append((time.perf_counter() - begin) / inner)
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

    def flops(self, lengths: np.ndarray) -> float:
        """Useful operations of one layer on texts of these lengths: products, scores and means."""
        intermediate = self.backend(compile=False, graphs=False).layers[0].up[0].shape[0]
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


def gemm(bench: Bench) -> list[dict[str, Any]]:
    """TFLOP/s of x @ w, w (out, in): a large square product, and the layers' products."""
    size, width = bench.sizes.gemm, bench.width
    shapes = [(size, size, size)]
    shapes += [
        (m, n, k) for m in bench.sizes.tokens for n, k in ((3 * width, width), (4 * width, width), (width, 4 * width))
    ]
    rows = []
    for m, n, k in shapes:
        x = torch.randn(m, k, device=bench.device, dtype=bench.model.dtype)
        w = torch.randn(n, k, device=bench.device, dtype=bench.model.dtype)
        seconds = bench.seconds(lambda x=x, w=w: torch.nn.functional.linear(x, w), inner=bench.sizes.inner)
        rows.append({"m": m, "n": n, "k": k, "tflops": 2 * m * n * k / seconds / 1e12})
    return rows


def peak_flops(bench: Bench) -> float:
    """Operations per second of the large product."""
    return 1e12 * gemm(replace(bench, sizes=replace(bench.sizes, tokens=())))[0]["tflops"]


def full_depth(bench: Bench) -> list[dict[str, Any]]:
    """The full model on texts of 128 tokens, from token ids to logits on the host."""
    lengths = np.full(bench.sizes.full_texts, min(128, bench.engine.deployment.max_length))
    batch, depths = bench.batch(lengths), np.full(len(lengths), bench.num_layers)
    seconds = bench.seconds(lambda: bench.engine.run_tokens(batch, settings=STOP, exit_layers=depths))
    peak = peak_flops(bench)
    useful = bench.flops(lengths) * bench.num_layers
    return [
        {
            "texts": len(lengths),
            "tokens_per_text": int(lengths[0]),
            "seconds": seconds,
            "texts_per_second": len(lengths) / seconds,
            "tokens_per_second": float(lengths.sum()) / seconds,
            "peak_tflops": peak / 1e12,
            "share_of_peak": useful / seconds / peak,
        }
    ]


def layer(bench: Bench) -> list[dict[str, Any]]:
    """One layer on texts of about 25 tokens."""
    most = 8192  # for graphs; a size of `bucket_sizes`
    variants = {
        "plain": bench.backend(compile=False, graphs=False),
        "compiled": bench.backend(graphs=False),
        "graph": bench.backend(graphs=True, record_after=0, graph_tokens=most),
    }
    rows = []
    for tokens in bench.sizes.tokens:
        lengths = draw_lengths(25, num_texts=2 * tokens // 25 + 1, longest=100)
        lengths = np.sort(lengths[np.cumsum(lengths) <= tokens])
        rows += [
            {"variant": name, **_layer_time(bench, backend, lengths)}
            for name, backend in variants.items()
            if name != "graph" or tokens <= most
        ]
    return rows


def attention(bench: Bench) -> list[dict[str, Any]]:
    """One layer, with attention in each way that takes the lengths."""
    rows = []
    for mean in bench.sizes.mean_lengths:
        longest = bench.engine.deployment.max_length
        for kind in ("tiles", "varlen", "runs"):
            try:
                backend = bench.backend(attention=kind, graphs=False)
            except ValueError as error:
                rows.append({"attention": kind, "mean_length": mean, "left_out": str(error)})
                continue
            # The same texts for all: where the mean is near a tile, lengths are cut at it; above it tiles are left out.
            top = 128 if mean <= 128 else longest
            if kind == "tiles" and top > 128:
                continue
            lengths = draw_lengths(mean, num_texts=2 * bench.sizes.attention_tokens // mean, longest=min(top, longest))
            lengths = np.sort(lengths[np.cumsum(lengths) <= bench.sizes.attention_tokens])
            rows.append({"attention": kind, "mean_length": mean, **_layer_time(bench, backend, lengths)})
    return rows


def _layer_time(bench: Bench, backend: CudaBackend, lengths: np.ndarray) -> dict[str, Any]:
    """Time of a layer, as a share of a walk through all layers."""

    def walk() -> None:
        state = live
        for number in range(1, bench.num_layers + 1):
            state = backend.advance(state, number, len(lengths))

    with torch.inference_mode():
        live = backend.start(bench.batch(lengths))
        seconds = bench.seconds(walk, inner=bench.sizes.inner) / bench.num_layers
    tokens = int(lengths.sum())
    return {"texts": len(lengths), "tokens": tokens, "seconds": seconds, "ns_per_token": 1e9 * seconds / tokens}


def staircase(bench: Bench) -> list[dict[str, Any]]:
    """Mixed depths against full depth, from token ids to logits on the host."""
    rows = []
    plain = bench.engine.replace()
    plain.course = replace(plain.course, backend=bench.backend(first_tokens_from=2**60))
    for num_texts in bench.sizes.texts:
        lengths = draw_lengths(25, num_texts=num_texts, longest=min(100, bench.engine.deployment.max_length))
        batch = bench.batch(lengths)
        full = np.full(num_texts, bench.num_layers)
        mixed = draw_depths(bench.engine.depths, num_texts=num_texts)
        for name, engine in (("whole_layers", plain), ("first_token_last", bench.engine)):
            times = [
                bench.seconds(lambda at=at, e=engine, b=batch: e.run_tokens(b, settings=STOP, exit_layers=at))
                for at in (full, mixed)
            ]
            layer_speedup = float((full * lengths).sum() / (mixed * lengths).sum())
            rows.append(
                {
                    "variant": name,
                    "texts": num_texts,
                    "tokens": int(lengths.sum()),
                    "mean_exit_layer": float(mixed.mean()),
                    "full_seconds": times[0],
                    "mixed_seconds": times[1],
                    "layer_speedup": layer_speedup,
                    "speedup": times[0] / times[1],
                    "realised": (times[0] / times[1]) / layer_speedup,
                    "texts_per_second": num_texts / times[1],
                }
            )
    return rows


def texts(bench: Bench) -> list[dict[str, Any]]:
    """Texts a second at full depth: from token ids, from raw texts, and Hugging Face's pipeline."""
    engine, sizes = bench.engine, bench.sizes
    lengths = draw_lengths(25, num_texts=sizes.raw_texts, longest=min(100, engine.deployment.max_length))
    vocabulary = [word for word in engine.tokenizer.get_vocab() if word.isascii() and word.isalnum()]
    words = np.random.default_rng(0).choice(np.array(sorted(vocabulary)), int(lengths.sum()))
    ends = np.cumsum(lengths)
    raw = [" ".join(words[end - length : end]) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
    batch = engine.tokenize(raw).batch
    full = np.full(len(raw), bench.num_layers)
    runs: list[tuple[str, int, Callable[[], object]]] = [
        ("token_ids", len(raw), lambda: engine.run_tokens(batch, settings=STOP, exit_layers=full)),
        ("raw_texts", len(raw), lambda: engine.predict(raw, speed=0)),
        ("tokenizer", len(raw), lambda: engine.tokenize(raw)),
    ]
    call: Any = pipeline("text-classification", model=bench.model, tokenizer=engine.tokenizer, device=bench.device)  # type: ignore[call-overload]
    some = raw[: sizes.pipeline_texts]

    def hugging_face(size: int) -> list[Any]:
        # A generator, not a list: the pipeline then keeps its data loader busy.
        return list(
            call((text for text in some), batch_size=size, truncation=True, max_length=engine.deployment.max_length)
        )

    runs += [(f"hf_pipeline_{size}", len(some), partial(hugging_face, size)) for size in sizes.pipeline_batches]
    rows = []
    for name, count, work in runs:
        seconds = bench.seconds(work)
        rows.append({"run": name, "texts": count, "seconds": seconds, "texts_per_second": count / seconds})
    return rows


KINDS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "gemm": gemm,
    "full_depth": full_depth,
    "layer": layer,
    "attention": attention,
    "staircase": staircase,
    "texts": texts,
}


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


def write(path: Path, kind: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Replace the rows of a kind that were measured on the same encoder."""
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    kept = [row for row in kept if (row["kind"], row["encoder"]) != (kind, about["encoder"])]
    path.parent.mkdir(exist_ok=True)
    lines = [*kept, *({"kind": kind, **row, **about} for row in rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> int:
    """Measure what is asked for; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder or id of an encoder of a packed family; default: BERT-base, random weights"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
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
    for kind in chosen:
        rows = KINDS[kind](bench)
        write(path, kind, rows, about)
        for row in rows:
            print(json.dumps({"kind": kind, **row}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
