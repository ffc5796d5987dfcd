"""Recipes and heads compared: accuracy at every exit, on development rows, at equal numbers of training rows.

Measured: for each recipe (and, for `geep`, each head) the accuracy of every exit on held-out rows, layers passes spent
and seconds. Not measured: several seeds, other encoders. Never looks at a test split. Stopped, it goes on with what is
missing:

    python benchmarks/recipes.py --data-dir DATA --data trec --model ENCODER --max-train 3000

appends to benchmarks/results/recipes.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from geep.data import divide, fetch_encoder, load_dataset
from geep.distilling import FeatureCache, fit_heads, with_exits
from geep.engine import Engine, EngineConfig
from geep.modeling import GeepForSequenceClassification
from geep.training import RECIPES, TrainSettings, encode, run_recipe

RESULTS = Path(__file__).parent / "results"

# The default first, then one thing changed at a time, then the rivals.
RUNS: tuple[dict[str, Any], ...] = (
    {"recipe": "fitted"},
    {"recipe": "geep"},
    {"recipe": "geep-paper"},
    {"recipe": "vanilla"},
    {"recipe": "fastbert"},
    {"recipe": "geep", "standardise": False},
    {"recipe": "pabee"},
    {"recipe": "geep", "head": "cls"},
    {"recipe": "geep", "head": "attention"},
    {"recipe": "geep-paper", "standardise": False},
)


def main() -> None:
    """Train what is not in the results yet, one run after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of data set folders")
    parser.add_argument("--data", required=True, help="data set name")
    parser.add_argument("--model", default="all-minilm-l6-v2", help="encoder")
    parser.add_argument("--max-train", type=int, default=3000)
    parser.add_argument("--max-dev", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path = RESULTS / "recipes.jsonl"
    done = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for row in done:  # settings that did not exist when a line was written had their defaults
        row["settings"] = {**asdict(TrainSettings()), **row["settings"]}
    dataset = load_dataset(args.data, data_dir=args.data_dir)
    parts = divide(dataset, max_train=args.max_train)
    encoder = fetch_encoder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    dev = parts.profile.select(range(min(len(parts.profile), args.max_dev)))
    for changes in RUNS:
        recipe, head = changes["recipe"], changes.get("head", "mean")
        settings = TrainSettings(
            recipe=recipe,
            epochs=args.epochs,
            max_length=args.max_length,
            bf16=args.bf16,
            standardise=changes.get("standardise", True),
        )
        key = {
            "kind": "recipe",
            "data": args.data,
            "encoder": Path(args.model).name,
            "head": head,
            "rows": len(parts.train),
            "settings": asdict(settings),
        }
        if any(all(row.get(name) == value for name, value in key.items()) for row in done):
            continue
        torch.manual_seed(settings.seed)
        has_exits = RECIPES[recipe].trains_exits
        model = GeepForSequenceClassification.from_encoder(
            encoder, label_names=dataset.label_names, exit_head=head, exit_layers=None if has_exits else []
        )
        rows = encode(tokenizer, parts.train.inputs, parts.train.labels, max_length=settings.max_length)
        begin = time.perf_counter()
        folder = Path("runs") / f"recipes-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"
        result = run_recipe(model, tokenizer, rows, settings=settings, checkpoint_dir=folder)
        engine = Engine(model, tokenizer, config=EngineConfig(dtype="float32"))
        if settings.fits_exits:
            # What says when to stop is not what accuracy is measured on.
            caches = [
                FeatureCache.of(engine, part, folder / name)
                for name, part in (("learn", parts.train), ("choose", parts.calibration))
            ]
            engine = Engine(
                with_exits(model, fit_heads(*caches, model.config)), tokenizer, config=EngineConfig(dtype="float32")
            )
        seconds = time.perf_counter() - begin
        answers = engine.exit_logits(engine.tokenize(dev.inputs).batch).argmax(-1)
        accuracy = (answers == torch.from_numpy(dev.labels)).float().mean(1).tolist()
        row = {
            **key,
            "depths": list(engine.depths),
            "accuracy": [round(value, 4) for value in accuracy],
            "dev_rows": len(dev),
            "steps": result.steps,
            "seconds": round(seconds, 1),
        }
        print(json.dumps(row), flush=True)
        RESULTS.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
