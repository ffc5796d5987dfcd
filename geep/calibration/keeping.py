"""Runs of all exits kept on disk between two calls: while somebody labels, nothing has to be run again."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from geep.calibration.runs import ExitRun, run_of
from geep.data import Split
from geep.engine import Engine
from geep.folder import digest_tensors, publish
from geep.predictor import text_hashes
from geep.progress import Progress, no_progress


def kept_run(engine: Engine, split: Split, folder: Path, *, what: str, progress: Progress = no_progress) -> ExitRun:
    """Return the run of texts without labels from a folder, or make it and keep it there.

    The file's name tells texts and engine, so another model, dtype or text finds nothing.

    Args:
        engine: The engine.
        split: The texts.
        folder: Where runs are kept.
        what: Names the work to `progress`.
        progress: Told what is being done.

    Raises:
        FloatingPointError: If logits of a text are not finite.
    """
    batch = engine.tokenize(split.inputs).batch
    hashes = text_hashes(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths))
    made_by = run_of(engine)
    path = folder / f"exits-{digest_tensors({'texts': hashes}, json.dumps(made_by, sort_keys=True))[:16]}.safetensors"
    found = load_file(path) if path.exists() else {}
    if found and (not engine.deployment.is_rounded or "reference" in found):
        return ExitRun(batch, found["exit_logits"], None, found.get("reference"), split.origin, made_by)
    run = ExitRun.of(engine, Split(split.texts, split.text_pairs, origin=split.origin), what=what, progress=progress)
    reference = {} if run.reference is None else {"reference": run.reference.contiguous()}
    publish(path, save({"exit_logits": run.exit_logits.contiguous(), **reference}))
    return run
