"""geep's table before another engine at full depth: what it is certain of it answers, the others run all layers there.

Two steps that need no exits. Their settings are certified as such (`check_layers=()`), for the promise that geep's
engine keeps. Text is tokenised once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker import Forward, Job, Outcome, sorted_logits

# Rivals' environments have what geep imports, and not geep.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from geep.engine import Engine, ExitSettings


def table_first(job: Job, forward: Forward, batch_size: int, pad: int) -> Callable[[int], Outcome]:
    """Return a run over the first texts of a job.

    Args:
        job: The texts; its option `cascade` holds the geep folder and the settings.
        forward: Batches of padded ids and mask to logits, for texts of which the table is not certain.
        batch_size: Of these batches, cut from texts sorted by length.
        pad: Id of the padding token.
    """
    asked: dict[str, Any] = job.options["cascade"]
    settings = ExitSettings.from_dict(asked["settings"])
    engine = Engine.from_pretrained(asked["folder"], device="cpu", compile=False)
    last = engine.depths[-1]

    def run(count: int) -> Outcome:
        batch = engine.tokenize(job.texts[:count]).batch
        plan = engine.planner.plan(batch, settings)
        if plan.lexical_logits is None:
            raise ValueError("The table has learned no labels; expected one that answers by itself.")
        answers = plan.lexical_logits.argmax(-1).numpy()
        rest = np.flatnonzero(plan.predicted_layers > 0)
        ids = np.split(batch.input_ids, np.cumsum(batch.lengths)[:-1])
        going = [ids[place].tolist() for place in rest]
        for places, logits in sorted_logits(going, forward, batch_size, pad):
            texts = rest[places]
            lexical = plan.lexical_logits[torch.from_numpy(texts)]
            answers[texts] = settings.answered(torch.from_numpy(logits), last, lexical).argmax(-1).numpy()
        return Outcome(answers.tolist(), np.where(plan.predicted_layers > 0, last, 0).tolist())

    return run
