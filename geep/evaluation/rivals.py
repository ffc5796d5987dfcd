"""Every way of running the model that is compared, each at its best batch size."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import pipeline

from geep.backends import BACKENDS, Backend
from geep.calibration import Outcomes
from geep.engine import Engine, ExitSettings, RunResult
from geep.exits import ExitProfile, follow
from geep.modeling import GeepForSequenceClassification

Integers = NDArray[np.int64]

# Batch sizes among which a rival that works by batches finds its best.
BATCH_SIZES: tuple[int, ...] = (1, 8, 32, 128)


@dataclass(frozen=True, slots=True)
class Rival:
    """A way of running the model.

    Attributes:
        name: What it is.
        group: As in `EvaluationRow`.
        setting: What was set.
        run: What is timed: answers the timed texts and returns their most likely labels, (num_timed,).
        outcomes: Exits of all texts in the dtype that it runs in, from which its quality is taken.
        columns: Exit column of every text of the split, (num_texts,).
        settings: How exits answer.
        deployed: Whether it is the engine as it was given.
    """

    name: str
    group: str
    setting: str
    run: Callable[[], Integers]
    outcomes: Outcomes
    columns: Integers
    settings: ExitSettings
    deployed: bool = False

    @property
    def dtype(self) -> str:
        """One of `DTYPES`, that it runs in."""
        return self.outcomes.engine.deployment.dtype


def line_up(
    outcomes: Outcomes,
    plain: Outcomes,
    texts: Sequence[Any],
    timed: Integers,
    sweep: tuple[float, ...],
    generator: np.random.Generator,
) -> list[Rival]:
    """Line up everything that is compared, each at its best batch size where it has one.

    Args:
        outcomes: The engine as deployed, on all texts.
        plain: The same in float32, for rivals that know no rounding: the same object where it runs in that.
        texts: The timed texts.
        timed: Which of all texts they are.
        sweep: Further speeds.
        generator: Draws random depths.
    """
    # Two batches of the largest size tell sizes apart; with fewer texts a size above their number is no size.
    trial = texts[: 2 * max(BATCH_SIZES)]
    sizes = tuple(size for size in BATCH_SIZES if size <= len(trial))
    return [
        *_full_models(outcomes, plain, texts, trial, sizes),
        *_constants(outcomes, texts),
        _fastbert(outcomes if outcomes.engine.deployment.dtype == "bfloat16" else plain, texts, trial, sizes),
        *_ours(outcomes, texts, timed, sweep, generator),
        _oracle(outcomes, texts, timed),
    ]


def _full_models(
    outcomes: Outcomes, plain: Outcomes, texts: Sequence[Any], trial: Sequence[Any], sizes: Sequence[int]
) -> list[Rival]:
    """All layers for every text: Hugging Face's pipeline, and the engine."""
    everyone = np.full(len(outcomes.run), len(outcomes.depths) - 1)
    unfused = replace(outcomes.engine.settings, speed=0.0)
    hf = _HfPipeline.of(plain.engine)
    arrival = _fastest(sizes, lambda size: hf(trial, size, by_length=False))
    rivals = []
    for size in sorted({arrival, 32}):
        note = "best batch size" if size == arrival else "common batch size"
        run = _bind(hf, texts, size, by_length=False)
        rivals.append(
            Rival(f"HF pipeline, batch {size}", "pipeline", f"arrival order, {note}", run, plain, everyone, unfused)
        )
    by_length = [(hf, plain, "pipeline-sorted", "HF pipeline")]
    if outcomes is not plain and outcomes.engine.deployment.dtype == "bfloat16":
        by_length.append((_HfPipeline.of(outcomes.engine), outcomes, "pipeline-bfloat16", "HF pipeline, bfloat16"))
    for call, judged, group, words in by_length:
        size = _fastest(sizes, partial(call, trial, by_length=True))
        run = _bind(call, texts, size, by_length=True)
        name = f"{words}, length-sorted, batch {size}"
        rivals.append(Rival(name, group, "best batch size", run, judged, everyone, unfused))
    run = _bind(_run_predict, outcomes.engine, texts, speed=0.0)
    name = f"full model, {outcomes.engine.deployment.backend_name}"
    rivals.append(Rival(name, "full", "speed 0", run, outcomes, everyone, unfused))
    return rivals


def _constants(outcomes: Outcomes, texts: Sequence[Any]) -> list[Rival]:
    """The same depth for every text: none, which is the table alone, or an exit's."""
    engine, rivals = outcomes.engine, []
    for column, depth in enumerate(outcomes.depths[:-1]):
        everyone = np.full(len(outcomes.run), column)
        if depth == 0:
            run = _bind(_run_lexical, engine, texts)
            rivals.append(Rival("the table alone", "lexical", "no encoder", run, outcomes, everyone, engine.settings))
        else:
            run = _bind(_run_at, engine, texts, np.full(len(texts), depth))
            name, setting = f"constant depth {depth}", f"{depth} layers"
            rivals.append(Rival(name, "constant", setting, run, outcomes, everyone, engine.settings))
    return rivals


def _fastbert(outcomes: Outcomes, texts: Sequence[Any], trial: Sequence[Any], sizes: Sequence[int]) -> Rival:
    """FastBERT's own run: every exit is asked of every text, from the first on."""
    settings = replace(outcomes.engine.settings, on_miss="continue", check_layers=None, lexical_exit=False)
    shrinking = ShrinkingBatch.of(outcomes.engine.replace(settings=settings))
    size = _fastest(sizes, lambda size: shrinking(trial, size))
    profile = outcomes.profile(settings)
    first = np.full(len(profile), int(np.searchsorted(profile.depths, 1)))
    columns = follow(profile, first, speed=settings.speed, on_miss="continue")
    run = _bind(shrinking, texts, size)
    name = f"FastBERT, shrinking batch {size}"
    return Rival(name, "fastbert", f"speed {settings.speed:g}", run, outcomes, columns, settings)


def _ours(
    outcomes: Outcomes, texts: Sequence[Any], timed: Integers, sweep: Sequence[float], generator: np.random.Generator
) -> list[Rival]:
    """The engine as deployed, also at other speeds; by the other rule on a miss; and at depths drawn at random."""
    engine, deployed = outcomes.engine, outcomes.engine.settings
    if deployed.on_miss == "stop":
        stop, going_on = deployed, replace(deployed, on_miss="continue")
    else:
        # The paper's: the median of a text's distribution, whatever the layer, and an encoder for every text.
        stop = replace(deployed, on_miss="stop", quantile=0.5, check_layers=None, lexical_exit=False)
        going_on = deployed
    without_lexical = outcomes.answered(replace(stop, lexical_exit=False))
    shuffled = generator.permutation(without_lexical)
    run = _bind(_run_at, engine, texts, np.asarray(outcomes.depths)[shuffled][timed])
    setting = f"speed {deployed.speed:g}"
    rivals = [Rival("random depths, stop's histogram", "random", setting, run, outcomes, shuffled, deployed)]
    for settings in (stop, going_on):
        is_deployed = settings is deployed
        speeds = [deployed.speed, *(speed for speed in sweep if speed != deployed.speed)] if is_deployed else []
        for number, speed in enumerate(speeds or [deployed.speed]):
            at = replace(settings, speed=speed)
            run = _bind(_run_predict, engine.replace(settings=at), texts)
            name = f"GEEP {settings.on_miss}" + (f", speed {speed:g}" if number else "")
            group, setting = f"geep-{settings.on_miss}", f"speed {speed:g}"
            is_ours = is_deployed and number == 0
            rivals.append(Rival(name, group, setting, run, outcomes, outcomes.answered(at), at, is_ours))
    return rivals


def _oracle(outcomes: Outcomes, texts: Sequence[Any], timed: Integers) -> Rival:
    settings = outcomes.engine.settings
    profile = outcomes.profile(settings)
    columns = stable_oracle(profile.from_depth(1)) + int(np.searchsorted(profile.depths, 1))
    run = _bind(_run_at, outcomes.engine, texts, np.asarray(profile.depths)[columns][timed])
    return Rival("oracle", "oracle", "answer never changes again", run, outcomes, columns, settings)


def _bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Integers]:
    """A run with its arguments, whose answers are told as label ids."""

    def run() -> Integers:
        found = function(*args, **kwargs)
        found = found.logits if isinstance(found, RunResult) else found
        return found.argmax(-1).numpy() if isinstance(found, Tensor) else np.asarray(found)

    return run


def _run_predict(engine: Engine, texts: Sequence[Any], *, speed: float | None = None) -> list[int]:
    """Answer raw texts by `predict`, records and all, as users do."""
    ids = {name: label for label, name in enumerate(engine.label_names)}
    return [ids[answer.label] for answer in engine.predict(texts, speed=speed)]


def _fastest(sizes: Sequence[int], run: Callable[[int], object]) -> int:
    """Try every size once, after a run that is not counted, and return the fastest."""
    run(sizes[-1])
    seconds = {}
    for size in sizes:
        begin = time.perf_counter()
        run(size)
        seconds[size] = time.perf_counter() - begin
    return min(seconds, key=lambda size: seconds[size])


def stable_oracle(profile: ExitProfile) -> Integers:
    """Column of the first exit from which the answer is the full model's and stays it: the bound for equal answers.

    A text whose last answer differs, as a quantised model's may, is never answered so and runs all layers.
    """
    same_from_here = np.logical_and.accumulate(profile.agrees[:, ::-1], axis=1)[:, ::-1]
    return np.where(same_from_here[:, -1], same_from_here.argmax(1), len(profile.depths) - 1)


def _run_at(engine: Engine, texts: Sequence[Any], exit_layers: Integers) -> RunResult:
    """Run raw texts to given depths on the engine: tokenised, scheduled and answered as `predict` does."""
    settings = replace(engine.settings, on_miss="stop")
    return engine.run_tokens(engine.tokenize(texts).batch, settings=settings, exit_layers=exit_layers)


def _run_lexical(engine: Engine, texts: Sequence[Any]) -> Tensor | None:
    """Answer raw texts by the table's guess at the label: a bag of n-grams, and what exit 0 can do by itself."""
    batch = engine.tokenize(texts).batch
    if engine.predictor is None:
        return None
    ids, lengths = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths)
    logits = engine.predictor.predict(ids, lengths, speed=engine.settings.speed).lexical_logits
    return None if logits is None else logits.softmax(-1)


def _in_its_dtype(engine: Engine) -> GeepForSequenceClassification:
    """The model in the dtype that an engine runs in, as others run it: cast as a whole. In 8 bits nobody can."""
    if engine.deployment.dtype != "bfloat16" or engine.model.dtype == torch.bfloat16:
        return engine.model
    return nn.Module.to(copy.deepcopy(engine.model), torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _HfPipeline:
    """Hugging Face's text-classification pipeline on the same model, in arrival order or sorted by length."""

    call: Any
    max_length: int
    label_ids: Mapping[str, int]

    @classmethod
    def of(cls, engine: Engine) -> _HfPipeline:
        make: Any = pipeline  # its overloads name every kind of model there is
        model = _in_its_dtype(engine)
        call = make("text-classification", model=model, tokenizer=engine.tokenizer, device=model.device)
        ids = {name: label for label, name in enumerate(engine.label_names)}
        return cls(call, engine.deployment.max_length, ids)

    def __call__(self, texts: Sequence[Any], batch_size: int, *, by_length: bool) -> Integers:
        inputs = [text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts]
        order = np.arange(len(inputs))
        if by_length:
            sizes = [len(text) if isinstance(text, str) else len(text[0]) + len(text[1]) for text in texts]
            order = np.argsort(sizes)
        # Given a generator, the pipeline keeps its data loader busy; given a list, it warns of just that.
        answers = self.call(
            (inputs[i] for i in order), batch_size=batch_size, truncation=True, max_length=self.max_length
        )
        labels = np.empty(len(inputs), dtype=np.int64)
        labels[order] = [self.label_ids[answer["label"]] for answer in answers]
        return labels


@dataclass(frozen=True, slots=True)
class ShrinkingBatch:
    """FastBERT's batched run as published: padded batches in arrival order, a classifier after every layer, texts that
    are certain enough leave the batch at once, the others go on in a smaller one.
    """  # noqa: D205

    engine: Engine
    backend: Backend[Any]

    @classmethod
    def of(cls, engine: Engine) -> ShrinkingBatch:
        """Run an engine's model, padded, at its settings."""
        model = _in_its_dtype(engine)
        return cls(engine, BACKENDS["padded"].build(model, dtype=str(model.dtype).removeprefix("torch.")))

    def __call__(self, texts: Sequence[Any], batch_size: int) -> Tensor:
        """Answer raw texts: probabilities (num_texts, num_labels)."""
        engine, backend, settings = self.engine, self.backend, self.engine.settings
        batch = engine.tokenize(texts).batch
        out = torch.empty(len(texts), len(engine.label_names))
        guess = engine.planner.plan(batch, settings).lexical_logits if settings.reads_table else None
        with torch.inference_mode():
            for start in range(0, len(texts), batch_size):
                rows = np.arange(start, min(start + batch_size, len(texts)))
                live = backend.start(batch.select(rows))
                for layer in range(1, engine.depths[-1] + 1):
                    live = backend.advance(live, layer, len(rows))
                    if layer not in engine.depths:
                        continue
                    lexical = None if guess is None else guess[torch.from_numpy(rows)]
                    logits = backend.exit_logits(live, layer, 0, len(rows)).float().cpu()
                    logits = settings.answered(logits, layer, lexical)
                    if layer == engine.depths[-1]:
                        sure = np.ones(len(rows), dtype=bool)
                    else:
                        unsure = settings.uncertainty(logits, layer, multi_label=engine.multi_label, lexical=lexical)
                        sure = unsure.numpy() < settings.speed
                    out[torch.from_numpy(rows[sure])] = logits[torch.from_numpy(sure)]
                    rows = rows[~sure]
                    if not len(rows):
                        break
                    if sure.any():
                        live = backend.select(live, np.flatnonzero(~sure))
        return out.softmax(-1)
