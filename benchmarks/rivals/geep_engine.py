"""Worker: geep's engine on one backend and dtype, with what belongs to the same weights: FastBERT's shrinking batch.

Options: `backend`, `dtype`, `folder`; `budgets`: sizes of the calls in which texts arrive; `beside_fastbert`: whether
FastBERT's shrinking batch stands beside ours, sorted by length and in these calls. For every size ours runs
with the folder's settings or with those calibrated for calls of it, whichever are faster on held-out texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from worker import Job, Loaded, Outcome, Way, best_batch_size, seconds_of, serve, versions

from geep.backends import Backend, TokenBatch
from geep.calibration import ExitRun, Outcomes, calibrate
from geep.data import Split
from geep.engine import Engine, ExitSettings
from geep.evaluation import ShrinkingBatch
from geep.exits import ExitProfile, follow
from geep.promise import NothingCertifiedError, Promise
from geep.scheduler import schedule
from geep.training import parts_of

TRIAL_TEXTS = 128
# Tokens of the texts on which utilisation is taken, and how many tokens they are together.
GROUPS: tuple[tuple[int, int], ...] = ((25, 30), (120, 136), (248, 264))
GROUP_TOKENS = 8192


def load(job: Job) -> Loaded:
    """Offer the full model, every constant depth, the calibrated engine, the table before the full model, and calls."""
    torch.set_num_threads(job.threads)
    options = job.options
    engine = Engine.from_pretrained(options["folder"], device="cpu", backend=options["backend"], dtype=options["dtype"])
    lines = _Lines(engine, job, f"{options['backend']} {options['dtype']}")
    run = ExitRun.of(engine, Split(job.texts, labels=None if job.labels is None else np.array(job.labels)))
    profile = Outcomes(engine, run).profile(engine.settings)
    ways = [lines.full(), *lines.constants(), *lines.utilisation()]
    # An engine without a promise is the full model: racing it against itself would say nothing.
    calibrated = engine.settings.speed > 0
    promised = _Promised.of(engine, options["folder"]) if calibrated else None
    if calibrated:
        ways += [lines.geep(), lines.parts("GEEP", None)]
        if options["beside_fastbert"]:
            ways.append(lines.fastbert(profile))
    ways.append(lines.parts("full", 0.0))
    if options.get("budgets") and calibrated:
        ways += lines.budgets(options["budgets"], profile, promised, beside_fastbert=options["beside_fastbert"])
    about: dict[str, Any] = {
        "deployed_as": engine.deployment.deployed_as,
        "certified": engine.certificate is not None,
        "speed": engine.settings.speed,
        "lengths": run.batch.lengths.tolist(),
        "depths": list(engine.depths),
        "quality": _quality(profile, engine.depths),
    }
    if calibrated:
        ids = {label: number for number, label in enumerate(engine.label_names)}
        found = engine.predict(job.texts)
        answers = np.array([ids[prediction.label] for prediction in found])
        layers = np.array([prediction.exit_layer for prediction in found])
        about["mean_exit_layer"] = float((layers * run.batch.lengths).sum() / run.batch.lengths.sum())
        right = answers == (run.exit_logits[-1].argmax(-1).numpy() if job.labels is None else np.array(job.labels))
        about["geep_quality"] = float(right.mean())
        two_steps = None if promised is None else promised.two_steps()
        if two_steps is not None:
            ways.append(lines.cascade(two_steps))
            about["cascade"] = {"folder": options["folder"], "settings": two_steps.to_dict()}
    return ways, versions("torch", "transformers", "tokenizers"), about


@dataclass(frozen=True, slots=True)
class _Promised:
    """Settings of an engine that keep the promise which its folder was calibrated for, found on the same rows."""

    engine: Engine
    promise: Promise
    texts: Sequence[Any]
    tuning: ExitRun
    fresh: ExitRun

    @classmethod
    def of(cls, engine: Engine, folder: str) -> _Promised | None:
        """Run the rows that are held out; None where nothing is certified."""
        if engine.certificate is None:
            return None
        _, parts = parts_of(folder)
        tuning, fresh = (ExitRun.of(engine, part) for part in (parts.profile, parts.calibration))
        return cls(engine, engine.certificate.promise, parts.profile.inputs, tuning, fresh)

    def two_steps(self) -> ExitSettings | None:
        """The table alone, then all layers; None where no speed is certified."""
        predictor = self.engine.predictor
        if predictor is None or predictor.num_labels is None:
            return None
        return self._certified(lexical_exit=True, check_layers=())

    def in_calls(self, size: int) -> Engine:
        """The engine with the settings that are faster in calls of so many texts, tried on texts of its own.

        Those of the folder, or those that are calibrated for the least time in such calls.
        """
        found = self._certified(cost=self.engine.measure_cost(), call_size=size)
        if found is None:
            return self.engine
        texts = self.texts[: max(TRIAL_TEXTS, size)]

        def answer(engine: Engine) -> None:
            for start in range(0, len(texts), size):
                engine.predict(texts[start : start + size])

        def seconds(engine: Engine) -> float:
            answer(engine)
            return min(seconds_of(lambda: answer(engine)) for _ in range(2))

        return min(self.engine, self.engine.replace(settings=found), key=seconds)

    def _certified(self, **how: Any) -> ExitSettings | None:
        try:
            settings = calibrate(self.engine, self.tuning, self.fresh, self.promise, **how).engine.settings
        except NothingCertifiedError:
            return None
        return settings if settings.speed else None


def _quality(profile: ExitProfile, depths: Sequence[int]) -> dict[str, float]:
    """Accuracy of every depth; without labels, agreement with the full model."""
    hits = profile.agrees if profile.correct is None else profile.correct
    return {str(depth): float(hits[:, profile.depths.index(depth)].mean()) for depth in depths}


@dataclass(frozen=True, slots=True)
class _Lines:
    """Makes the ways of one engine."""

    engine: Engine
    job: Job
    label: str

    def _way(
        self,
        name: str,
        group: str,
        setting: str,
        run: Callable[[int], Outcome],
        *,
        batch_size: int | None = None,
        **about: Any,
    ) -> Way:
        """A way after a short trial, which also warms it up."""
        count = min(TRIAL_TEXTS, len(self.job.texts))
        seconds = seconds_of(lambda: run(count)) / count
        return Way(
            f"{self.label}: {name}",
            group,
            setting,
            run,
            seconds_per_text=seconds,
            batch_size=batch_size,
            about={"engine": self.label, **about},
        )

    def full(self) -> Way:
        return self._way("full model", "full", "speed 0", lambda count: self._predict(count, speed=0.0))

    def geep(self) -> Way:
        settings = self.engine.settings
        setting = f"speed {settings.speed:g}, {settings.on_miss}, as calibrated"
        return self._way("GEEP", "geep", setting, lambda count: self._predict(count))

    def cascade(self, settings: ExitSettings) -> Way:
        """Two steps that need no exits: the table where it is certain, else all layers."""
        alone = self.engine.replace(settings=settings)
        return self._way(
            "the table, then the full model",
            "cascade",
            f"speed {settings.speed:g}",
            lambda count: self._predict(count, engine=alone),
        )

    def fastbert(self, profile: ExitProfile) -> Way:
        """FastBERT's shrinking batch over texts sorted by length, at its best batch size."""
        shrinking = ShrinkingBatch.of(self.engine)
        left_at = _fastbert_layers(self.engine, profile)

        def run(texts: Sequence[str], size: int) -> NDArray[np.int64]:
            order = np.argsort([len(text) for text in texts], kind="stable")
            answers = np.empty(len(texts), dtype=np.int64)
            answers[order] = shrinking([texts[place] for place in order], size).argmax(-1).numpy()
            return answers

        size, _ = best_batch_size(self.job.trial(by_length=True), run)
        return self._way(
            "FastBERT, shrinking batch",
            "fastbert",
            f"length-sorted, speed {self.engine.settings.speed:g}",
            lambda count: Outcome(run(self.job.texts[:count], size).tolist(), left_at[:count].tolist()),
            batch_size=size,
        )

    def _predict(
        self, count: int, *, speed: float | None = None, per_call: int | None = None, engine: Engine | None = None
    ) -> Outcome:
        texts, size, engine = self.job.texts[:count], per_call or count, engine or self.engine
        predictions = [
            prediction
            for start in range(0, count, size)
            for prediction in engine.predict(texts[start : start + size], speed=speed)
        ]
        ids = {label: number for number, label in enumerate(self.engine.label_names)}
        return Outcome(
            [ids[prediction.label] for prediction in predictions], [prediction.exit_layer for prediction in predictions]
        )

    def constants(self) -> list[Way]:
        def run(count: int, depth: int) -> Outcome:
            batch = self.engine.tokenize(self.job.texts[:count]).batch
            settings = replace(self.engine.settings, on_miss="stop", lexical_exit=False, speed=0.0)
            result = self.engine.run_tokens(batch, settings=settings, exit_layers=np.full(count, depth))
            return Outcome(result.logits.argmax(-1).tolist(), [depth] * count)

        return [
            self._way(
                f"constant depth {depth}",
                "constant",
                f"{depth} layers",
                lambda count, depth=depth: run(count, depth),
                depth=depth,
            )
            for depth in self.engine.depths[:-1]
        ]

    def parts(self, name: str, speed: float | None) -> Way:
        """Where the time of a call goes; the steps are taken one by one, as `predict` takes them."""
        engine = self.engine
        settings = engine.settings if speed is None else replace(engine.settings, speed=speed)

        def run(count: int) -> Outcome:
            clock = [time.perf_counter()]
            batch = engine.tokenize(self.job.texts[:count]).batch
            clock.append(time.perf_counter())
            layers = engine.planner.plan(batch, settings).predicted_layers
            clock.append(time.perf_counter())
            running = layers > 0
            schedule(layers[running], batch.lengths[running], max_batch_tokens=engine.deployment.max_batch_tokens)
            clock.append(time.perf_counter())
            engine.run_tokens(batch, settings=settings)
            clock.append(time.perf_counter())
            tokenise, plan, cut, whole = np.diff(clock).tolist()
            # run_tokens plans and schedules once more.
            return Outcome(
                extra={
                    "tokenise": tokenise,
                    "plan": plan,
                    "schedule": cut,
                    "run": max(whole - plan - cut, 0.0),
                    "from_ids": whole,
                }
            )

        return self._way(f"parts of {name}", "parts", name, run, line="geep" if speed is None else "full")

    def utilisation(self) -> list[Way]:
        """The full model on texts of about one length, with the operations that it needs."""
        config = self.engine.model.encoder.config
        settings = replace(self.engine.settings, speed=0.0)
        ways = []
        for low, high in GROUPS:
            batch = _texts_of_length(self.engine, self.job.texts, low, high)
            flops = encoder_flops(batch.lengths, config.num_hidden_layers, config.hidden_size, _inner_size(config))

            def run(_count: int, batch: TokenBatch = batch) -> Outcome:
                self.engine.run_tokens(batch, settings=settings)
                return Outcome()

            ways.append(
                Way(
                    f"{self.label}: full model, texts of {low}-{high} tokens",
                    "utilisation",
                    f"{low}-{high} tokens",
                    run,
                    seconds_per_run=seconds_of(lambda run=run: run(0)),
                    about={"engine": self.label, "flops": flops, "texts": len(batch), "tokens": [low, high]},
                )
            )
        return ways

    def budgets(
        self, sizes: Sequence[int], profile: ExitProfile, promised: _Promised | None, *, beside_fastbert: bool
    ) -> list[Way]:
        """Texts that come in calls of a size: ours at its best, and FastBERT's, each beside its own full depth."""
        engine = self.engine
        shrinking = ShrinkingBatch.of(engine)
        left_at = _fastbert_layers(engine, profile)

        def fastbert(count: int, size: int) -> Outcome:
            scores = shrinking(self.job.texts[:count], size)
            return Outcome(scores.argmax(-1).tolist(), left_at[:count].tolist())

        def padded_full(count: int, size: int) -> Outcome:
            return Outcome(_padded_full(engine, shrinking.backend, self.job.texts[:count], size))

        sizes = sorted({min(size, len(self.job.texts)) for size in sizes})
        engines = {size: engine if promised is None else promised.in_calls(size) for size in sizes}
        ours = {
            "geep": lambda count, size: self._predict(count, per_call=size, engine=engines[size]),
            "packed-full": lambda count, size: self._predict(count, speed=0.0, per_call=size),
        }
        if beside_fastbert:
            ours |= {"fastbert": fastbert, "padded-full": padded_full}
        ways = []
        for size in sizes:
            for system, run in ours.items():
                ways.append(
                    self._way(
                        f"{system}, {size} texts a call",
                        "budget",
                        f"{size} texts a call",
                        lambda count, run=run, size=size: run(count, size),
                        system=system,
                        texts_per_call=size,
                    )
                )
        return ways


def _fastbert_layers(engine: Engine, profile: ExitProfile) -> NDArray[np.int64]:
    """Layer at which each text leaves when every exit is asked of it."""
    depths = np.asarray(profile.depths)
    start = np.full(len(profile), int(np.searchsorted(depths, 1)))
    return depths[follow(profile, start, speed=engine.settings.speed, on_miss="continue")]


def _padded_full(engine: Engine, backend: Backend[Any], texts: Sequence[str], size: int) -> list[int]:
    """All layers for all texts, padded, in arrival order: what a shrinking batch has to beat."""
    batch = engine.tokenize(texts).batch
    answers: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(texts), size):
            rows = np.arange(start, min(start + size, len(texts)))
            live = backend.start(batch.select(rows))
            for layer in range(1, engine.depths[-1] + 1):
                live = backend.advance(live, layer, len(rows))
            answers += backend.exit_logits(live, engine.depths[-1], 0, len(rows)).argmax(-1).tolist()
    return answers


def encoder_flops(lengths: NDArray[np.int64], layers: int, hidden: int, inner: int) -> float:
    """Operations that texts of these lengths need in the encoder's layers; a multiply and an add are two.

    A token takes 8 h² (query, key, value, output) + 4 h f (the two linears of width f), and 4 h for each token that it
    attends to.
    """
    tokens = float(lengths.sum())
    return layers * (tokens * (8 * hidden**2 + 4 * hidden * inner) + 4 * hidden * float((lengths**2).sum()))


def _inner_size(config: Any) -> int:
    return int(getattr(config, "intermediate_size", None) or config.hidden_dim)


def _texts_of_length(engine: Engine, texts: Sequence[str], low: int, high: int) -> TokenBatch:
    """Texts of `low` to `high` tokens, cut from the data set's own tokens laid end to end."""
    source = engine.tokenize(texts).batch
    edges = np.cumsum(source.lengths)
    inner = np.ones(len(source.input_ids), dtype=bool)
    inner[edges - 1], inner[edges - source.lengths] = False, False
    first, last, words = source.input_ids[0], source.input_ids[edges[0] - 1], source.input_ids[inner]
    random = np.random.default_rng(0)
    lengths = random.integers(low, high + 1, GROUP_TOKENS // ((low + high) // 2))
    ids = np.resize(words, int(lengths.sum()))
    ends = np.cumsum(lengths)
    ids[ends - lengths], ids[ends - 1] = first, last
    return TokenBatch(ids, None, lengths)


if __name__ == "__main__":
    serve(load)
