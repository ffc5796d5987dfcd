"""The int8 engine of a float32 one; a rounded one that is far off is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from geep.backends import PackedBackend
from geep.backends.int8 import observe
from geep.backends.packed_layer import packed_layers
from geep.calibration.runs import ExitRun
from geep.data import Split
from geep.engine import Engine
from geep.exits import profile_exits
from geep.scheduler import schedule

# A rounded model that is further off than this, before any exit, is broken rather than a little less accurate.
MAX_ROUNDED_DROP = 0.01
MAX_ROUNDED_DISAGREEMENT = 0.05


class RoundedTooFarError(ValueError):
    """A rounded engine's full model is too far from the float32 one."""


# Texts on which activations are observed; their ranges hardly move beyond a few hundred.
_OBSERVED_TEXTS = 1024


def quantise(engine: Engine, texts: Split) -> Engine:
    """Return the int8 engine of a float32 one on the packed backend, without table.

    `Engine.save_exits` keeps the ranges of its activations in the model's folder, for `Engine.from_pretrained`.

    Args:
        engine: Engine whose weights are float32.
        texts: Texts on which the ranges of the activations are observed; the first thousand are taken.

    Raises:
        ValueError: If the encoder's layers cannot be packed or quantised, or there are no texts.
    """
    batch = engine.tokenize(texts.inputs[:_OBSERVED_TEXTS]).batch
    plain = packed_layers(engine.model)
    packed = PackedBackend(engine.model, layers=(), dtype=torch.float32)  # embeds; the plain layers run
    everyone = np.full(len(batch), engine.depths[-1])
    with torch.inference_mode():
        cuts = schedule(everyone, batch.lengths, max_batch_tokens=engine.deployment.max_batch_tokens)
        starts = (packed.start(batch.select(cut.indices)) for cut in cuts)
        ranges = observe(plain, ((live.hidden, live.layout) for live in starts))
    return Engine(
        engine.model,
        engine.tokenizer,
        config=replace(engine.config, backend="packed", dtype="int8"),
        identity=engine.identity,
        ranges=ranges,
    )


def check_rounded(run: ExitRun, dtype: str, *, multi_label: bool) -> None:
    """Refuse a rounded engine, run in this dtype, that is far from its float32 model with all layers run.

    Raises:
        RoundedTooFarError: With what it loses.
    """
    if run.reference is None:
        return
    every = profile_exits(
        run.exit_logits[-1:], [1], labels=run.labels, reference=run.reference, multi_label=multi_label
    )
    if every.correct is not None and every.reference_correct is not None:
        lost, most = float(every.reference_correct.mean() - every.correct.mean()), MAX_ROUNDED_DROP
        what = "points of accuracy"
    else:
        lost, most = float((~every.agrees).mean()), MAX_ROUNDED_DISAGREEMENT
        what = "% of the answers"
    if lost > most:
        raise RoundedTooFarError(
            f"{dtype} loses {100 * lost:.1f} {what} of the float32 model on {len(every):,} held-out texts with all "
            f"layers run, expected at most {100 * most:g}; use float32{' or bfloat16' if dtype == 'int8' else ''}."
        )
