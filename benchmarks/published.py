"""GEEP as it is published, on exits that are there: a table of counts, and nothing of what geep has beside it."""

from __future__ import annotations

from dataclasses import replace

import torch

from geep.calibration import TABLE_SPEEDS, ExitRun, Outcomes
from geep.engine import Engine, ExitSettings
from geep.predictor import TextExits, fit_predictor

RULE = ExitSettings(criterion="entropy", on_miss="stop")


def as_published(engine: Engine, teaching: ExitRun, tuning: ExitRun) -> Engine:
    """Return an engine with the table of counts of where texts leave when exits answer by their own entropy.

    `geep.profile(kind="counts")` counts exits that answer together with the table and have a temperature: they are
    certain of other texts. Here the table learns no labels, so that there is nothing to answer together with, nor an
    exit 0.

    Args:
        engine: Engine of a model with exits; its table and settings do not count.
        teaching: Texts that fill the table.
        tuning: Texts that its levels come from.
    """
    if engine.predictor is not None:
        engine = Engine(engine.model, engine.tokenizer, config=engine.config, identity=engine.identity)
    seen, heldout = (TextExits(*run.flat, _exits(engine, run)) for run in (teaching, tuning))
    table = fit_predictor(
        "counts",
        seen,
        None,
        heldout,
        depths=engine.depths,
        speeds=TABLE_SPEEDS,
        num_labels=len(engine.label_names),
        vocab_size=engine.model.encoder.config.vocab_size,
        special_ids=sorted(set(engine.tokenizer.all_special_ids)),
        multi_label=engine.multi_label,
    )
    return engine.replace(predictor=table, settings=RULE)


def _exits(engine: Engine, run: ExitRun) -> torch.Tensor:
    """Place in the depths of each text's exit at each of `TABLE_SPEEDS`, (num_texts, num_speeds)."""
    # Which exits are asked does not depend on the speed, but at speed 0 none is.
    profile = Outcomes(engine, run).profile(replace(RULE, speed=1.0))
    return torch.stack([torch.from_numpy(profile.exit_indices(speed)) for speed in TABLE_SPEEDS], dim=1)
