"""Compare the engine with its honest rivals, in one run, interleaved, each at its best setting.

Quality (accuracy, agreement, layers) is taken on all texts of a split, from one pass over all exits of the engine as
deployed, and one in float32 for rivals that know no quantisation. Time is taken on a random part of them, from raw text
to predictions, every rival once a round in a new order, so that a slow minute of the machine hits all alike; the median
of the rounds is reported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geep.backends import TokenBatch
from geep.calibration import ExitRun, Outcomes, PredictorQuality, layer_quality, predictor_quality, run_of
from geep.data import Split
from geep.engine import Engine
from geep.evaluation.report import EvaluationReport, EvaluationRow
from geep.evaluation.rivals import Rival, line_up
from geep.exits import ExitProfile
from geep.progress import Progress, no_progress

Integers = NDArray[np.int64]

# Speeds of the trade-off curve, fixed before any text is seen.
SWEEP: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)


def evaluate(
    engine: Engine,
    split: Split,
    *,
    max_texts: int = 512,
    rounds: int = 3,
    sweep: Sequence[float] = SWEEP,
    seed: int = 0,
    progress: Progress = no_progress,
) -> EvaluationReport:
    """Measure the engine beside its rivals.

    Args:
        engine: The engine as deployed, with a table, at the speed to be evaluated (above 0).
        split: Texts to evaluate on, with labels or without.
        max_texts: Bound on the texts of the timed part.
        rounds: Rounds of timing.
        sweep: Further speeds at which the engine is run, by its own rule on a miss, for the trade-off curve.
        seed: Draws the timed texts, the random depths and the order within rounds.
        progress: Told what is being done, how much is done and how much there is.

    Raises:
        ValueError: If there are no texts or labels of another model, no table, the speed is 0 or a number is below 1.
    """
    if not len(split):
        raise ValueError("No texts to evaluate on; expected at least one.")
    for name, value in (("max_texts", max_texts), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if engine.predictor is None:
        raise ValueError("Evaluation compares predictions of exit layers, found no exit table; run `geep profile`.")
    if engine.settings.speed == 0:
        raise ValueError(
            "The engine's speed is 0: every text runs all layers, so there is nothing to compare. "
            "Run `geep calibrate`, or give a speed."
        )
    generator = np.random.default_rng(seed)
    outcomes, plain = _outcomes(engine, split, progress)
    batch, profile = outcomes.run.batch, outcomes.profile(engine.settings)

    timed = np.sort(generator.permutation(len(split))[:max_texts])
    texts = split.select(timed).inputs
    progress("best batch sizes of the rivals", 0, 1)
    rivals = line_up(outcomes, plain, texts, timed, tuple(dict.fromkeys(sweep)), generator)

    progress("best batch sizes of the rivals", 1, 1)
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    verified: dict[str, float] = {}
    steps = (rounds + 1) * len(rivals)
    done = 0
    for number in range(rounds + 1):
        for index in generator.permutation(len(rivals)):
            rival = rivals[index]
            _wait_for_device(engine)
            begin = time.perf_counter()
            answers = rival.run()
            _wait_for_device(engine)
            if number:  # round 0 fills caches and is not counted
                seconds[rival.name].append(time.perf_counter() - begin)
            else:  # what is timed has to be what the quality was taken from
                expected = rival.outcomes.answers(rival.settings)[rival.columns[timed], timed].argmax(-1).numpy()
                verified[rival.name] = float((answers == expected).mean())
            done += 1
            progress(f"timing {len(rivals)} rivals, {rounds} rounds and a warm-up", done, steps)
    full = next(rival.name for rival in rivals if rival.group == "full")
    full_rate = float(np.median(len(texts) / np.asarray(seconds[full])))
    rows = tuple(
        _row(
            rival,
            timed,
            len(texts) / np.asarray(seconds[rival.name]),
            full_rate,
            verified=verified[rival.name],
        )
        for rival in rivals
    )
    return EvaluationReport(
        rows=rows,
        quality=_qualities(engine, profile, batch),
        num_texts=len(split),
        num_timed=len(texts),
        rounds=rounds,
        speed=engine.settings.speed,
        machine=machine(engine),
    )


def _outcomes(engine: Engine, split: Split, progress: Progress) -> tuple[Outcomes, Outcomes]:
    """All exits of the engine as deployed, and in float32; the same object where it runs in that."""
    what = "all exits, texts to evaluate"
    run = ExitRun.of(engine, split, what=what, progress=progress, with_reference=False)
    if not engine.deployment.is_rounded:
        outcomes = Outcomes(engine, run)
        return outcomes, outcomes
    in_float32 = engine.in_float32().replace(predictor=engine.predictor, settings=engine.settings)
    logits = in_float32.exit_logits(run.batch, what="all exits in float32", progress=progress)
    plain = replace(run, exit_logits=logits, made_by=run_of(in_float32))
    return Outcomes(engine, replace(run, reference=logits[-1])), Outcomes(in_float32, plain)


def _row(
    rival: Rival,
    timed: Integers,
    rates: NDArray[Any],
    full_rate: float,
    *,
    verified: float,
) -> EvaluationRow:
    profile, batch = rival.outcomes.profile(rival.settings), rival.outcomes.run.batch
    texts, depths = np.arange(len(profile)), np.asarray(profile.depths)
    layers = depths[rival.columns]
    tokens = batch.lengths[timed]
    mean = float(layers.mean())
    token_layers = float((layers[timed] * tokens).sum())
    return EvaluationRow(
        name=rival.name,
        group=rival.group,
        dtype=rival.dtype,
        deployed=rival.deployed,
        setting=rival.setting,
        accuracy=None if profile.correct is None else float(profile.correct[texts, rival.columns].mean()),
        agreement=float(profile.agrees[texts, rival.columns].mean()),
        mean_exit_layer=mean,
        layer_speedup=float(depths[-1]) / mean if mean else None,
        timed_layer_speedup=float(depths[-1] * tokens.sum()) / token_layers if token_layers else None,
        throughput=float(np.median(rates)),
        throughput_low=float(rates.min()),
        throughput_high=float(rates.max()),
        ratio=float(np.median(rates)) / full_rate,
        lexical_share=float((layers == 0).mean()),
        verified=verified,
    )


def _qualities(engine: Engine, profile: ExitProfile, batch: TokenBatch) -> tuple[PredictorQuality, ...]:
    """Judge the deployed predictor beside the best constant and beside what text length alone can tell."""
    speed, predictor = engine.settings.speed, engine.predictor
    if predictor is None:
        return ()
    inner = profile.from_depth(1)
    actual = inner.exit_layers(speed)
    median = np.full(len(actual), int(np.median(actual)))
    lengths = batch.lengths
    return (
        predictor_quality(inner, batch, predictor, speed),
        layer_quality("length", speed, lengths, _layers_by_length(lengths, actual), actual),
        layer_quality("constant", speed, median, median, actual),
    )


def _layers_by_length(lengths: Integers, actual: Integers, bins: int = 16) -> Integers:
    """Median exit layer of texts of about the same length, each half of the texts told from the other half."""
    predicted = np.empty_like(actual)
    folds = np.arange(len(lengths)) % 2
    for fold in (0, 1):
        known, asked = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if not len(known):
            known = asked
        edges = np.unique(np.quantile(lengths[known], np.linspace(0, 1, bins + 1)[1:-1]))
        groups = np.searchsorted(edges, lengths[known])
        medians = np.array(
            [
                np.median(actual[known][groups == group] if (groups == group).any() else actual[known])
                for group in range(len(edges) + 1)
            ]
        )
        predicted[asked] = medians[np.searchsorted(edges, lengths[asked])].astype(np.int64)
    return predicted


def _wait_for_device(engine: Engine) -> None:
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize()


def machine(engine: Engine) -> dict[str, Any]:
    """Describe what a measurement ran on; absolute times mean nothing without it."""
    device = engine.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": engine.deployment.dtype,
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """Name of this machine's CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"
