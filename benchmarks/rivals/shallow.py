"""Worker: the encoder's first layers, fine-tuned at that depth, on geep's engine: what one would train without exits.

Options: `depth`, how many layers; `dtypes`, by which it is run. It is trained once, on the rows and by the settings
that the full model was trained with, and kept beside the exported models.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from worker import Job, Loaded, Outcome, Way, seconds_of, serve, versions

import geep
from geep.calibration import quantise
from geep.data import Split
from geep.engine import Engine
from geep.folder import Provenance
from geep.training import TrainSettings, parts_of

TRIAL_TEXTS = 256


def load(job: Job) -> Loaded:
    """Train the shallow model where that was not done yet; offer it in each dtype."""
    torch.set_num_threads(job.threads)
    depth = job.options["depth"]
    folder = Path(job.export_dir) / f"first-{depth}"
    train(Path(job.model_dir), folder, depth)
    count = min(TRIAL_TEXTS, len(job.texts))
    ways = []
    for dtype in job.options["dtypes"]:
        engine = Engine.from_pretrained(folder, device="cpu", dtype="float32" if dtype == "int8" else dtype)
        if dtype == "int8":
            engine = quantise(engine, Split(job.calibration_texts))

        def run(count: int, engine: Engine = engine) -> Outcome:
            ids = {label: number for number, label in enumerate(engine.label_names)}
            return Outcome([ids[found.label] for found in engine.predict(job.texts[:count])], [depth] * count)

        run(count)
        ways.append(
            Way(
                f"{depth} layers, fine-tuned at that depth, packed {dtype}",
                "shallow",
                f"{depth} layers for every text",
                run,
                seconds_per_text=seconds_of(lambda run=run: run(count)) / count,
                about={"dtype": dtype},
            )
        )
    return ways, versions("torch", "transformers", "tokenizers"), {}


def train(model_dir: Path, folder: Path, depth: int) -> None:
    """Fine-tune the encoder's first layers as the full model was; a folder that is finished is kept."""
    about = Provenance.read(model_dir).about
    _, parts = parts_of(model_dir)
    settings = replace(TrainSettings(**about["settings"]), recipe="vanilla", fit_exits=False, encoder_layers=depth)
    geep.train(parts, folder, encoder=about["encoder"], settings=settings, head=about["head"])


if __name__ == "__main__":
    serve(load)
