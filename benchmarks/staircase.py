"""One real window of test texts: where each is predicted to leave, where it leaves, and who runs with whom.

Recorded, on a calibrated model folder that `geep train` made: of texts drawn at random from the test split of its data
set, in the order in which the scheduler runs them, the staircase, tokens, predicted layer and layer of the answer, and
whether the answer is the float32 full model's. Batches are smaller than the engine's own, so that a window small enough
to be drawn takes several. Not measured: time.

    python benchmarks/study.py --data-dir DATA --model ENCODER --only trec --steps by-time
    python benchmarks/staircase.py --data-dir DATA --model-dir runs-by-time/trec

writes benchmarks/results/staircase.jsonl; `benchmarks/plot.py` draws it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from geep.data import Split, load_dataset
from geep.engine import Engine, ExitSettings
from geep.evaluation import machine
from geep.scheduler import schedule

RESULTS = Path(__file__).parent / "results" / "staircase.jsonl"


def main() -> None:
    """Parse arguments, run one window, write its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of data set folders")
    parser.add_argument("--model-dir", type=Path, required=True, help="a calibrated folder made by `geep train`")
    parser.add_argument("--texts", type=int, default=96, help="texts of the window")
    parser.add_argument("--batch-tokens", type=int, default=256, help="tokens of a staircase, at most")
    parser.add_argument("--seed", type=int, default=0, help="which texts are drawn")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    data = json.loads((args.model_dir / "training.json").read_text(encoding="utf-8"))["about"]["data"]["name"]
    test = load_dataset(data, data_dir=args.data_dir).test
    if test is None:
        raise SystemExit(f"{data} has no test split, from which the texts are drawn.")
    engine = Engine.from_pretrained(args.model_dir, device="cpu", max_batch_tokens=args.batch_tokens)
    if engine.certificate is None:
        raise SystemExit(f"Nothing is certified in {args.model_dir}; run `geep calibrate {args.model_dir}` first.")
    drawn = np.random.default_rng(args.seed).permutation(len(test))[: args.texts]
    lines = window(engine, test.select(drawn))
    lines[0] |= {"data": data, "test_texts": len(test), "seed": args.seed}
    args.results.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"wrote {len(lines) - 1} texts of {data} to {args.results}")


def window(engine: Engine, texts: Split) -> list[dict[str, Any]]:
    """A line about the window, then one for each text: staircases as they run, and last whom the table answers alone.

    Raises:
        ValueError: If the texts are more than the engine sorts together.
    """
    batch = engine.tokenize(texts.inputs).batch
    if batch.lengths.sum() > engine.config.window_tokens:
        raise ValueError(f"Found {batch.lengths.sum()} tokens, expected one window: {engine.config.window_tokens}.")
    run = engine.run_tokens(batch)
    full = engine.in_float32().run_tokens(batch, settings=ExitSettings(speed=0.0))
    agrees = run.logits.argmax(-1) == full.logits.argmax(-1)
    budget = engine.deployment.max_batch_tokens
    running, known = np.flatnonzero(run.predicted_layers > 0), np.flatnonzero(run.predicted_layers == 0)
    staircases = [
        running[staircase.indices]
        for staircase in schedule(run.predicted_layers[running], batch.lengths[running], max_batch_tokens=budget)
    ]
    about = {
        "kind": "window",
        "texts": len(batch),
        "layers": engine.depths[-1],
        "batch_tokens": budget,
        "speed": engine.settings.speed,
        "quantile": engine.settings.quantile,
        "promise": None if engine.certificate is None else asdict(engine.certificate.promise),
        "machine": machine(engine),
    }
    return [
        about,
        *(
            {
                "kind": "text",
                "staircase": place,
                "tokens": int(batch.lengths[text]),
                "predicted": int(run.predicted_layers[text]),
                "exit": int(run.exit_layers[text]),
                "agrees": bool(agrees[text]),
            }
            for place, members in [*enumerate(staircases), (None, known)]
            for text in members
        ),
    ]


if __name__ == "__main__":
    main()
