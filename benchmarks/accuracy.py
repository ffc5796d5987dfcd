"""What is kept: accuracy on the whole test split of the full model, of every constant depth and of GEEP as calibrated.

`throughput.py` times a few hundred texts; this runs them all once, on every backend and dtype asked for. The full model
is float32 on the same weights, whatever the engine. Not measured: time, several seeds.

    python benchmarks/accuracy.py --data-dir DATA --model-dir runs/trec runs/sst2 \
        --engines packed:float32,packed:int8=runs-int8/{data}

writes benchmarks/results/accuracy.jsonl, a line for each data set and engine; those measured already with the same
files are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from throughput import RESULTS, digest_of, engine_choices

from geep.data import load_dataset
from geep.engine import Engine, ExitSettings


def main() -> None:
    """Parse arguments; measure each folder and engine that is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of data set folders")
    parser.add_argument("--model-dir", type=Path, nargs="+", required=True, help="folders made by `geep train`")
    parser.add_argument("--engines", default="packed:float32", help="as of throughput.py")
    parser.add_argument("--max-texts", type=int, help="first so many test texts only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    path = args.results / "accuracy.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for folder in args.model_dir:
        lines = measured(folder, args, lines)
        args.results.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        print(f"wrote {folder.name} to {path}", flush=True)


def measured(folder: Path, args: argparse.Namespace, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with those of one model folder made anew where they are missing."""
    data = json.loads((folder / "training.json").read_text(encoding="utf-8"))["about"]["data"]["name"]
    reference: Reference | None = None
    for engine in engine_choices(args.engines, data, folder):
        made_of = {"folder": digest_of(engine.folder), "max_texts": args.max_texts}
        if any(line["data"] == data and line["engine"] == engine.name and line["made_of"] == made_of for line in lines):
            continue
        if reference is None:
            reference = Reference(data, args)
        made = Engine.from_pretrained(engine.folder, device="cpu", backend=engine.backend, dtype=engine.dtype)
        line = {"kind": "accuracy", "data": data, "engine": engine.name, "made_of": made_of, **reference.compare(made)}
        lines = [old for old in lines if (old["data"], old["engine"]) != (data, engine.name)] + [line]
    return lines


class Reference:
    """The test texts, and the float32 full model's answers once an engine has lent its weights."""

    def __init__(self, data: str, args: argparse.Namespace) -> None:
        test = load_dataset(data, data_dir=args.data_dir).test
        if test is None or test.labels is None:
            raise SystemExit(f"{data} has no labelled test split, which this measures on.")
        self.test = test if args.max_texts is None else test.select(np.arange(min(args.max_texts, len(test))))
        self.answers: torch.Tensor | None = None

    def compare(self, engine: Engine) -> dict[str, Any]:
        """Outcomes of an engine on all test texts."""
        batch, labels = engine.tokenize(self.test.inputs).batch, torch.from_numpy(self.test.labels)
        full_settings = ExitSettings(speed=0.0)
        if self.answers is None:
            self.answers = engine.in_float32().run_tokens(batch, settings=full_settings).logits.argmax(-1)
        exits = engine.exit_logits(batch).argmax(-1)
        run = engine.run_tokens(batch)
        answers, settings = run.logits.argmax(-1), engine.settings
        used = float((run.exit_layers * batch.lengths).sum())
        return {
            "texts": len(batch),
            "full_accuracy": float((self.answers == labels).float().mean()),
            "all_layers_accuracy": float((exits[-1] == labels).float().mean()),
            "accuracy": float((answers == labels).float().mean()),
            "agreement": float((answers == self.answers).float().mean()),
            "constant_accuracy": {
                str(depth): float((exit_ == labels).float().mean())
                for depth, exit_ in zip(engine.depths, exits, strict=True)
            },
            "mean_exit_layer": float(run.exit_layers.mean()),
            "layer_speedup": float(engine.depths[-1] * batch.lengths.sum() / used) if used else None,
            "lexical_share": float((run.exit_layers == 0).mean()),
            "speed": settings.speed,
            "criterion": settings.criterion,
            "quantile": settings.quantile,
            "check_layers": settings.check_layers,
            "certified": engine.certificate is not None,
            "deployed_as": engine.deployment.deployed_as,
        }


if __name__ == "__main__":
    main()
