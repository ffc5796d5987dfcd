"""What a promise is worth on texts of another source, and whether the drift figure tells.

Measured, on model folders that `geep train` made, for labelled rows like those that certified (training rows that
nothing was learned from, where some were left out), for their own test split and for the test splits of other data sets
with the same labels:

- accuracy of the float32 full model and of the certified engine, agreement, mean layers: whether the promise held;
- the drift between the texts that certified and windows of these texts, `WINDOWS` drawn at random of each size, with
  replacement, as further texts of the source would come: median and 5 and 95 % quantiles of the figure, and the share
  of windows that `geep predict` would warn of.

Not measured: gradual drift, time.

    python benchmarks/drift.py --data-dir DATA --runs-dir RUNS --pairs sst2:yelp_polarity,book_review:shopping

appends to benchmarks/results/drift.jsonl what is not there yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from guarantee import left_out
from tables import append, read

import geep
from geep.engine import Engine, ExitSettings, Predictions

RESULTS = Path(__file__).parent / "results" / "drift.jsonl"
WINDOWS = 200
SIZES = (100, 500, 2000)
MOST_TEXTS = 4000
LEFT_OUT = "training rows left out"


def main() -> None:
    """Parse arguments and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of data set folders")
    parser.add_argument("--runs-dir", type=Path, required=True, help="where the trained model folders are")
    parser.add_argument(
        "--pairs", required=True, help="folder:other data set, by commas; a folder alone: its own texts"
    )
    args = parser.parse_args()
    done = {(line["data"], line["source"]) for line in read(RESULTS)}
    for pair in args.pairs.split(","):
        name, _, other = pair.partition(":")
        sources = [each for each in dict.fromkeys([LEFT_OUT, name, other or name]) if (name, each) not in done]
        for line in measured(args.runs_dir / name, sources, args.data_dir):
            done.add((name, line["source"]))
            append(RESULTS, {"data": name, **line})
            print(name, line["source"], line["full_accuracy"], line["accuracy"], line["windows"], flush=True)


def measured(folder: Path, sources: list[str], data_dir: Path) -> Iterator[dict[str, Any]]:
    """One line for each source."""
    if not sources:
        return
    engine = Engine.from_pretrained(folder, device="cpu")
    if engine.certificate is None:
        raise SystemExit(f"Nothing is certified of {folder}, expected a promise that texts may break.")
    full = engine.in_float32()
    plan, parts = geep.parts_of(folder)
    # What the certificate holds (`Certificate.traffic`), for folders of older versions, too.
    reference = engine.predict_columns(parts.calibration.inputs).traffic
    for source in sources:
        if source == LEFT_OUT:
            test = left_out(parts, plan.load())
        else:
            dataset = geep.load_dataset(source, data_dir=data_dir)
            if dataset.test is None or dataset.label_names != engine.label_names:
                raise SystemExit(f"{source} has no test rows with the labels {engine.label_names}.")
            test = dataset.test
        if test.labels is None:
            raise SystemExit(f"The rows of {source} have no labels, which say whether the promise held.")
        if len(test) < SIZES[0]:
            continue
        test = test.select(np.sort(np.random.default_rng(0).permutation(len(test))[:MOST_TEXTS]))
        labels = test.labels
        batch = engine.tokenize(test.inputs).batch
        answers = full.run_tokens(batch, settings=ExitSettings(speed=0.0)).logits.argmax(-1).numpy()
        found = engine.predict_columns(test.inputs)
        yield {
            "source": source,
            "texts": len(test),
            "promise": str(engine.certificate.promise),
            "deployed_as": engine.deployment.deployed_as,
            "full_accuracy": _percent(answers == labels),
            "accuracy": _percent(found.label_ids == labels),
            "agreement": _percent(found.label_ids == answers),
            "layers": round(float(found.exit_layers.mean()), 3),
            "unknown": _percent(found.unknown_shares),
            "reference_layers": round(reference.mean_exit_layer, 3),
            "reference_unknown": round(100 * (reference.unknown_share or 0.0), 2),
            "windows": list(_windows(reference, found)),
        }


def _windows(reference: geep.Traffic, found: Predictions) -> Iterator[dict[str, Any]]:
    random, num_texts = np.random.default_rng(0), len(found)
    if found.unknown_shares is None:
        raise SystemExit("The model has no table.")
    for size in SIZES:
        if size > num_texts:
            continue
        drifts = []
        for _ in range(WINDOWS):
            rows = random.choice(num_texts, size)
            live = geep.Traffic.of(found.exit_layers[rows], found.unknown_shares[rows])
            drifts.append(geep.Drift.between(reference, live))
        figures = np.array([drift.figure for drift in drifts])
        yield {
            "size": size,
            "figure": [round(float(value), 4) for value in np.quantile(figures, [0.05, 0.5, 0.95])],
            "layers": round(float(np.median([drift.layers for drift in drifts])), 4),
            "unknown": round(float(np.median([drift.unknown or 0.0 for drift in drifts])), 4),
            "certain": round(float(np.mean([drift.is_certain for drift in drifts])), 3),
            "noted": round(float(np.mean([drift.is_large for drift in drifts])), 3),
        }


def _percent(values: Any) -> float:
    return round(100 * float(np.mean(values)), 2)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
