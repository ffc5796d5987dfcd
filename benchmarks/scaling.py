"""How time and memory grow: with the number of texts, their length, the encoder's layers and the labels.

Measured, each in a fresh process, so that peak memory is the case's own:

- texts: a file of 1,000 … 1,000,000 rows (the test texts, repeated) scored into another file, as `geep predict` does,
  by a calibrated model;
- length (8 … 512 tokens), layers (4 … 24), labels (2 … 150): full depth of an encoder of random weights, 384 wide, from
  token ids; with labels also every exit asked for every text, the most that heads can cost.

Not measured: accuracy (weights are random), GPUs. A case whose estimated time is above --budget-minutes is left out and
said so. Stopped, it goes on with what is missing:

    python benchmarks/scaling.py --data-dir DATA --model-dir runs/thucnews

appends to benchmarks/results/scaling.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

TEXTS = (1_000, 10_000, 100_000, 1_000_000)
LENGTHS = (8, 16, 32, 64, 128, 256, 512)
LAYERS = (4, 6, 8, 12, 16, 24)
LABELS = (2, 10, 50, 150)
# Tokens of a random case: enough for a second of work or so.
CASE_TOKENS = 8192
VOCABULARY = 1000


@dataclass(frozen=True, slots=True)
class RandomCase:
    """An encoder of random weights, and texts of one length.

    Attributes:
        axis: What is varied: "length", "layers" or "labels".
        length: Tokens of a text.
        layers: Encoder layers; an exit after each but the last.
        labels: Number of labels.
        every_exit: Ask every exit for every text instead of the full model alone.
        width: Width of the hidden states.
        tokens: Tokens of all texts together.
    """

    axis: str
    length: int = 30
    layers: int = 12
    labels: int = 2
    every_exit: bool = False
    width: int = 384
    tokens: int = CASE_TOKENS


def random_cases() -> list[RandomCase]:
    """All cases of random weights."""
    return [
        *(RandomCase("length", length=length) for length in LENGTHS),
        *(RandomCase("layers", layers=layers) for layers in LAYERS),
        *(RandomCase("labels", labels=labels, every_exit=asked) for labels in LABELS for asked in (False, True)),
    ]


def main() -> None:
    """Measure what is not in the results yet; with --child, one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of data set folders")
    parser.add_argument("--model-dir", type=Path, help="calibrated model; without it, texts are left out")
    parser.add_argument("--max-texts", type=int, default=max(TEXTS))
    parser.add_argument("--budget-minutes", type=float, default=10.0, help="longest a single case may take")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3, help="runs of a random case; the median is kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(child(args)))
        return
    path = args.results / "scaling.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = [json.loads(line)["case"] for line in lines]
    cases: list[dict[str, Any]] = [{"random": asdict(case)} for case in random_cases()]
    if args.model_dir is not None:
        cases += [{"texts": count} for count in TEXTS if count <= args.max_texts]
    rate: float | None = None
    args.results.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases, start=1):
        key = {**case, "threads": args.threads, "model": args.model_dir.name if "texts" in case else None}
        if key in done:
            continue
        if "texts" in case and rate is not None and case["texts"] / rate > 60 * args.budget_minutes:
            minutes = case["texts"] / rate / 60
            print(f"{case}: about {minutes:.0f} minutes, above --budget-minutes; left out", file=sys.stderr)
            continue
        print(f"[{number}/{len(cases)}] {json.dumps(case)}", file=sys.stderr, flush=True)
        measured = run_child(case, args)
        line = {"kind": "scaling", "case": key, **measured}
        rate = measured["throughput"] if "texts" in case else rate
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run_child(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measure a case in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(case), "--threads", args.threads]
    command += ["--repeats", args.repeats]
    for flag, value in (("--model-dir", args.model_dir), ("--data-dir", args.data_dir)):
        command += [] if value is None else [flag, value]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        sys.exit(f"the case {case} failed with code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one case in this process."""
    import torch

    from geep.engine import Engine
    from geep.evaluation import machine

    torch.set_num_threads(args.threads)
    if "random" in args.child:
        case = RandomCase(**args.child["random"])
        engine = random_engine(case)
        return {**time_random(engine, case, args.repeats), "machine": machine(engine)}
    engine = Engine.from_pretrained(args.model_dir, device="cpu", dtype="float32")
    texts = test_texts(args.model_dir, args.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        return {**time_file(engine, texts, args.child["texts"], Path(folder)), "machine": machine(engine)}


def test_texts(model_dir: Path, data_dir: Path | None) -> list[str]:
    """Test texts of the data set that a model was trained on."""
    from geep.data import load_dataset

    about = json.loads((model_dir / "training.json").read_text(encoding="utf-8"))["about"]["data"]
    test = load_dataset(about["name"], data_dir=data_dir or about["data_dir"]).test
    if test is None:
        raise ValueError(f"Data set {about['name']} has no test split; there are no texts to repeat.")
    return test.texts


def time_file(engine: Any, texts: Sequence[str], count: int, folder: Path) -> dict[str, Any]:
    """Score a file of `count` rows, the texts repeated, into another file."""
    from geep.scoring import score_file

    source = folder / "texts.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for row in range(count):
            file.write(json.dumps({"text": texts[row % len(texts)]}, ensure_ascii=False) + "\n")
    engine.predict(texts[:64])
    loaded = memory("VmRSS")
    begin, told = time.monotonic(), time.monotonic()

    def progress(what: str, rows: int, total: int | None) -> None:
        nonlocal told
        if time.monotonic() - told > 10:
            told = time.monotonic()
            left = (told - begin) * (count - rows) / max(rows, 1)
            print(f"    {rows:,} of {count:,} rows, {left:.0f} s left", file=sys.stderr, flush=True)

    report = score_file(engine, source, folder / "answers.jsonl", overwrite=True, progress=progress)
    layers = sum(layer * number for layer, number in report.exit_layer_counts.items()) / max(report.rows, 1)
    return {
        "axis": "texts",
        "value": count,
        "throughput": report.rows / report.seconds,
        "seconds": report.seconds,
        "mean_exit_layer": layers,
        "loaded_mib": loaded,
        "peak_mib": memory("VmHWM"),
    }


def random_engine(case: RandomCase) -> Any:
    """An engine of random weights; its tokenizer is there for form's sake."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from geep.engine import Engine, EngineConfig
    from geep.modeling import GeepForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=max(case.width // 32, 1),
        intermediate_size=4 * case.width,
        max_position_embeddings=max(LENGTHS),
    )
    model = GeepForSequenceClassification.from_encoder(
        BertModel(config, add_pooling_layer=False),
        num_labels=case.labels,
        exit_layers=list(range(1, case.layers)),
    )
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    return Engine(model, tokenizer, config=EngineConfig(device="cpu", dtype="float32"))


def time_random(engine: Any, case: RandomCase, repeats: int) -> dict[str, Any]:
    """Time texts of one length from token ids: median of some runs after one that is not counted."""
    import numpy as np

    from geep.backends import TokenBatch
    from geep.engine import ExitSettings

    count = max(case.tokens // case.length, 1)
    ids = np.random.default_rng(0).integers(2, VOCABULARY, count * case.length)
    batch = TokenBatch(ids, None, np.full(count, case.length))
    # Nothing is ever as certain as this: each exit is asked, and none answers before the last.
    settings = ExitSettings(speed=1e-12 if case.every_exit else 0.0)
    loaded = memory("VmRSS")
    seconds = []
    for number in range(repeats + 1):
        begin = time.perf_counter()
        engine.run_tokens(batch, settings=settings)
        if number:
            seconds.append(time.perf_counter() - begin)
    median = float(np.median(seconds))
    return {
        "axis": case.axis,
        "value": getattr(case, case.axis),
        "every_exit": case.every_exit,
        "throughput": count / median,
        "tokens_per_second": count * case.length / median,
        "seconds": median,
        "loaded_mib": loaded,
        "peak_mib": memory("VmHWM"),
    }


def memory(name: str) -> float | None:
    """A size of this process in MiB: "VmRSS" now, "VmHWM" at most; None where the system does not tell.

    Not `getrusage`: its peak includes the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


if __name__ == "__main__":
    main()
