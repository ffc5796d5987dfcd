"""`accelerate`: from a fine-tuned classifier and texts without labels to a finished model folder.

Read `TextsFor` (what texts are for), then `accelerate`, which takes the steps.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from geep.acceleration.fitting import WORK, FittedExits, fit_exits, save_with_exits
from geep.acceleration.looking import look_ahead
from geep.acceleration.prospects import prospects
from geep.acceleration.record import Acceleration, Pace
from geep.calibration import ExitRun, Outcomes, RoundedTooFarError, Route, calibrate, profile, save_refusal
from geep.calibration.runs import check_labels
from geep.data import Split, distinct, thirds, unseen
from geep.distilling import FitSettings
from geep.engine import Engine, EngineConfig
from geep.folder import TRAINING_FILE, HubOptions, Provenance, reachable
from geep.modeling import from_classifier
from geep.progress import Progress, no_progress
from geep.promise import NothingCertifiedError, Promise, check_enough

logger = logging.getLogger(__name__)

_DEFAULT_PROMISE = Promise(min_agreement=0.99)
_DEFAULT_SETTINGS = FitSettings()

# Shares of the texts that are learned from and chosen on; the rest certifies.
_LEARN, _CHOOSE = 0.6, 0.15

# Texts that are timed: enough for some batches, few enough to take seconds.
_TIMED = 400

# Texts by which a language is told that the tokenizer does not know.
_LOOKED_AT = 500


@dataclass(frozen=True, eq=False)
class TextsFor:
    """What texts are for; no text is in two parts.

    Attributes:
        learn: Exits and table learn from them.
        choose: They say when to stop learning, and which settings are best.
        tune: Labelled rows to choose settings on, for a promise about accuracy. None: `choose`.
        certify: They certify the promise.
        num_texts: Different texts that were given.
        copies: Further ones.
    """

    learn: Split
    choose: Split
    tune: Split | None
    certify: Split
    num_texts: int
    copies: int

    @classmethod
    def of(cls, texts: Split, calibration: Split | None, promise: Promise, *, seed: int) -> TextsFor:
        """Divide texts at random: 60 % to learn from, 15 % to choose on, 25 % to certify on.

        Rows named for calibration certify in their place; a promise about accuracy chooses settings on a third of them.

        Raises:
            ValueError: If there are too few texts, or calibration rows lack what the promise needs or are of another
                kind.
        """
        if promise.needs_labels and (calibration is None or calibration.labels is None):
            raise ValueError(
                f"To promise {promise} takes labelled rows, found none; give some with calibration= (--calibration), "
                "or promise agreement with the full model: min_agreement (--min-agreement)."
            )
        if calibration is not None and (calibration.text_pairs is None) != (texts.text_pairs is None):
            kinds = ["single texts" if part.text_pairs is None else "pairs" for part in (texts, calibration)]
            raise ValueError(f"The texts are {kinds[0]} and the rows for calibration {kinds[1]}, expected both alike.")
        rows = distinct(Split(texts.texts, texts.text_pairs, origin=texts.origin))
        copies, count = len(texts) - len(rows), len(rows)
        if copies > len(texts) / 2:
            logger.warning("Of %d texts only %d are different; copies teach nothing.", len(texts), len(rows))
        each, tune = Route.all_to(promise)[0].each, None
        if calibration is None:
            learn, choose = round(_LEARN * count), round((_LEARN + _CHOOSE) * count)
            share = 1 - _LEARN - _CHOOSE
            needed = int(np.ceil((each.texts_needed + 1) / share))
            check_enough(
                count - choose,
                each,
                note=f" Of {count:,} different texts {share:.0%} certify: with {needed:,} texts there are enough.",
            )
        else:
            certify = distinct(calibration)
            if promise.needs_labels:
                parts = thirds(certify, seed=seed)
                tune, certify = parts.profile, parts.calibration
            check_enough(
                len(certify), each, note=" Two thirds of the rows given certify." if promise.needs_labels else ""
            )
            rows = unseen(rows, calibration)
            if len(rows) < count / 2:
                logger.warning(
                    "%d of %d texts are among the rows that certify, and are not learned from: they would certify "
                    "themselves. Was another file meant?",
                    count - len(rows),
                    count,
                )
            learn, choose = round((1 - _CHOOSE) * len(rows)), len(rows)
        if learn < 1 or choose - learn < 1:
            raise ValueError(f"Found {len(rows):,} different texts to learn from, expected some thousands.")
        order = np.random.default_rng(seed).permutation(len(rows))
        cuts = [rows.select(np.sort(part)) for part in np.split(order, [learn, choose])]
        return cls(cuts[0], cuts[1], tune, cuts[2] if calibration is None else certify, count, copies)


def accelerate(
    model: str | Path,
    texts: Split,
    output: str | Path,
    *,
    promise: Promise = _DEFAULT_PROMISE,
    calibration: Split | None = None,
    exit_layers: Sequence[int] | None = None,
    head: str = "conv",
    settings: FitSettings = _DEFAULT_SETTINGS,
    max_length: int | None = None,
    check_pace: bool = True,
    device: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Progress = no_progress,
) -> Acceleration:
    """Give a fine-tuned classifier exits that answer as it does, learned of texts without labels, and certify them.

    The classifier does not move: at speed 0 the model that is written answers with its logits. Stopped, the same call
    goes on; a finished folder is returned as it is.

    Args:
        model: Folder or hub id of a sequence classifier of one of `CLASSIFIERS`.
        texts: Texts like those to come, some thousands; labels are not read.
        output: Folder of the model: weights, tokenizer, table, settings, certificate, and `training.json`, which is
            written last.
        promise: What must be kept. One about accuracy needs labelled rows in `calibration`.
        calibration: Rows like those to come, which certify in the place of a fifth of the texts; labelled by the
            classifier's own label ids. Texts that are among them are not learned from.
        exit_layers: Layers with an exit. None: all but the last two.
        head: Row of `HEADS`.
        settings: How heads are fitted; the seed is also that of the division.
        max_length: Longest text in tokens, kept with the tokenizer. None: the classifier's limit.
        check_pace: Whether a certified speed that is slower here than the full model is refused, so that the full model
            answers. False: the model is for another machine.
        device: "cpu", "cuda", …; None: a GPU where there is one.
        revision: Branch, tag or commit of a model of the hub.
        token: Access token of the hub, or True for the stored one.
        cache_dir: Folder for what is fetched. None: the hub's own.
        local_files_only: Whether to use what was fetched before and ask no network.
        progress: Told what is being done, how much is done and how much there is.

    Raises:
        TooFewTextsError: If there are too few different texts to certify what is asked; said before any work.
        ValueError: If the model is no such classifier or has no tokenizer, the folder holds another model, or texts,
            rows and promise do not belong together.
        OSError: If there is no such model.
    """
    started = time.perf_counter()
    parts = TextsFor.of(texts, calibration, promise, seed=settings.seed)
    folder, work = Path(output), Path(output) / WORK
    source = str(Path(model).resolve()) if Path(model).exists() else str(model)
    hub = reachable(source, HubOptions(revision, token, cache_dir, local_files_only))
    plain = from_classifier(source, **hub.keywords())
    plain.config.text_pairs = texts.text_pairs is not None
    tokenizer = _tokenizer(source, hub)
    if plain.config.text_pairs:
        plain.config.separator_id = tokenizer.sep_token_id
    # Heads are taught by scores, which float32 has as they are.
    full = Engine(plain, tokenizer, config=EngineConfig(device=device, dtype="float32", max_length=max_length))
    tokenizer.model_max_length = full.deployment.max_length
    asked = {
        "classifier": source,
        "revision": revision,
        "model": full.identity,
        "head": head,
        "exit_layers": None if exit_layers is None else ",".join(map(str, exit_layers)),
        "settings": asdict(settings),
        "max_length": full.deployment.max_length,
        "data": None,
        "promise": asdict(promise),
        "digests": {
            "texts": Split(texts.texts, texts.text_pairs).digest(),
            "calibration": None if calibration is None else calibration.digest(),
        },
        "label_names": list(full.label_names),
        "rows": len(texts),
    }
    before = _finished(folder, asked)
    if before is not None:
        return before
    for rows in (parts.tune, parts.certify):
        if rows is not None:
            check_labels(full, rows)
    _warn_of_unknown_words(full, parts.learn)

    options: dict[str, Any] = {
        "head": head,
        "exit_layers": exit_layers,
        "settings": settings,
        "progress": progress,
    }
    look_ahead(full, parts.learn, parts.choose, promise, work, **options)
    fitted = fit_exits(full, parts.learn, parts.choose, work, **options)
    save_with_exits(full, fitted.heads, folder)
    certify: dict[str, Any] = {"check_pace": check_pace, "progress": progress}
    try:
        done = _certified(full, fitted, folder, parts, promise, dtype=None, **certify)
    except RoundedTooFarError as rounded:
        logger.warning("%s It is certified in float32.", rounded)
        done = _certified(full, fitted, folder, parts, promise, dtype="float32", **certify)
    done = replace(done, seconds=round(time.perf_counter() - started, 1))
    Provenance(asked, done.record(), []).write(folder)
    shutil.rmtree(work)
    return done


def _certified(
    full: Engine,
    fitted: FittedExits,
    folder: Path,
    parts: TextsFor,
    promise: Promise,
    *,
    dtype: str | None,
    check_pace: bool,
    progress: Progress,
) -> Acceleration:
    """Teach the table, find the speed and write both; say what was gained.

    Raises:
        RoundedTooFarError: If rounding alone may cost more than is promised; nothing is written then.
    """
    engine = Engine.from_pretrained(folder, exits=False, device=full.model.device.type, dtype=dtype)
    found = profile(engine, _run_of(full, fitted), parts.choose, progress=progress)
    certified = ExitRun.of(engine, parts.certify, what="all exits, texts to certify the promise on", progress=progress)
    tuning = found.heldout
    if parts.tune is not None:
        tuning = ExitRun.of(engine, parts.tune, what="all exits, texts to choose settings on", progress=progress)
    options: dict[str, Any] = {"profile": found.record(), "asked": asdict(promise)}
    try:
        result = calibrate(found.engine, tuning, certified, promise, progress=progress)
        if engine.deployment.is_rounded and result.engine.certificate is None:
            raise RoundedTooFarError(
                f"In {engine.deployment.dtype} not even the full model is certified to keep {promise}."
            )
        _check_that_it_pays(result.engine, certified)
        progress("timing", 0, 1)
        before, after = _paces(result.engine, certified, parts.certify)
        if check_pace:
            _check_pace(before, after)
    except NothingCertifiedError as refusal:
        logger.warning("%s", refusal)
        save_refusal(found.engine, folder, refusal, **options)
        kept, said = found.engine, {"speed": 0.0, "refused": str(refusal), "certificate": None}
        (rate,) = _texts_per_second([_unrounded(kept)], parts.certify)
        before = after = Pace(float(kept.depths[-1]), rate, 1.0)
    else:
        result.save(folder, **options)
        kept, said = result.engine, result.record()
    progress("timing", 1, 1)
    return Acceleration(
        promise=str(promise),
        speed=kept.settings.speed,
        before=before,
        after=after,
        calibration=json.loads(json.dumps(said)),
        depths=fitted.heads.depths,
        losses=fitted.heads.losses,
        num_texts=parts.num_texts,
        copies=parts.copies,
        num_learned=len(fitted.seen),
        num_chosen=len(parts.choose),
        num_certified=len(parts.certify),
        prospects=prospects(Outcomes(kept, tuning), kept.settings, promise),
    )


def _tokenizer(source: str, hub: HubOptions) -> PreTrainedTokenizerBase:
    lacks = f"{source} has no tokenizer that can be read, expected the one that the classifier was fine-tuned with; "
    lacks += "save it beside the model: tokenizer.save_pretrained(folder)."
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, **hub.keywords()
        )
    except Exception as error:  # of several libraries, some of which know no other kind
        raise ValueError(f"{lacks} ({error})") from error
    # Where there is no file, some kinds are made all the same, of nothing but special tokens.
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < 2:
        raise ValueError(lacks)
    return tokenizer


def _finished(folder: Path, asked: dict[str, Any]) -> Acceleration | None:
    """What a folder says of the same request, if it was finished.

    Raises:
        ValueError: If the folder holds another model.
    """
    if (folder / TRAINING_FILE).exists():
        record = Provenance.read(folder)
        other = sorted(name for name in {*asked, *record.about} if record.about.get(name) != asked.get(name))
        if other:
            raise ValueError(
                f"{folder} holds a model that was made otherwise: found another {', '.join(other)}. Nothing was "
                "changed; choose another output, or delete it."
            )
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return replace(Acceleration.from_record(record.result), was_finished=True)
    if (folder / "config.json").exists() and not (folder / WORK).exists():
        raise ValueError(f"{folder} holds a model already, which is not touched; choose another output.")
    return None


def _warn_of_unknown_words(engine: Engine, texts: Split) -> None:
    """Say that the tokenizer knows hardly a word: then the model knows the language as little."""
    ids = engine.tokenize(texts.select(range(min(len(texts), _LOOKED_AT))).inputs).batch.input_ids
    own = ids[~np.isin(ids, sorted(set(engine.tokenizer.all_special_ids) - {engine.tokenizer.unk_token_id}))]
    share = float((own == engine.tokenizer.unk_token_id).mean()) if len(own) else 0.0
    if share > 0.5:
        logger.warning(
            "%.0f %% of the tokens are unknown to the model's tokenizer; expected texts in a language that the model "
            "was made for.",
            100 * share,
        )


def _run_of(engine: Engine, fitted: FittedExits) -> ExitRun:
    """All exits of the texts that they learned from: the encoder is not run again."""
    texts = fitted.seen.texts
    return ExitRun(engine.tokenize(texts.inputs).batch, fitted.heads.logits(fitted.seen), None, texts_from=texts.origin)


def _check_that_it_pays(engine: Engine, run: ExitRun) -> None:
    """Refuse a speed at which exits are asked and save nothing; all layers, rounded and certified, may still pay.

    Raises:
        NothingCertifiedError: If no text is answered before the last layer.
    """
    outcomes = Outcomes(engine, run)
    if engine.deployment.is_rounded and engine.certificate is not None:
        return
    if (outcomes.answered(engine.settings) == len(outcomes.depths) - 1).all():
        raise NothingCertifiedError(
            f"No speed that keeps the promise answers any of {len(run):,} texts before the last layer: the full model "
            "answers (speed 0), as before. More texts to learn from, or a lower promise, would help."
        )


def _check_pace(before: Pace, after: Pace) -> None:
    """Refuse a speed that saves layers and no time: nobody is left slower.

    Raises:
        NothingCertifiedError: If the full model is faster.
    """
    if after.texts_per_second < before.texts_per_second:
        raise NothingCertifiedError(
            f"The speed that keeps the promise runs {after.layers:.2f} of {before.layers:g} layers, but on this "
            f"machine it answers {after.texts_per_second:,.1f} texts a second and the full model "
            f"{before.texts_per_second:,.1f}: the full model answers (speed 0), as before. To keep the speed, "
            "for another machine: check_pace=False (--any-pace)."
        )


def _paces(engine: Engine, run: ExitRun, texts: Split) -> tuple[Pace, Pace]:
    """The full model as it was, in float32, and the engine at its speed, on texts that certified it."""
    outcomes = Outcomes(engine, run)
    profiled = outcomes.profile(engine.settings)
    column, rows = outcomes.answered(engine.settings), np.arange(len(run))
    layers, agreement = float(np.asarray(profiled.depths)[column].mean()), float(profiled.agrees[rows, column].mean())
    full, fast = _texts_per_second([_unrounded(engine), engine], texts)
    return Pace(float(engine.depths[-1]), full, 1.0), Pace(layers, fast, agreement)


def _unrounded(engine: Engine) -> Engine:
    """The full model that promises are about."""
    if engine.deployment.is_rounded:
        return engine.in_float32()
    return engine.replace(settings=replace(engine.settings, speed=0.0))


def _texts_per_second(engines: Sequence[Engine], texts: Split) -> list[float]:
    """Time engines on some texts, in turn, so that a slow minute hits all; the first of three rounds makes warm."""
    timed = texts.select(range(min(len(texts), _TIMED))).inputs
    seconds = [float("inf")] * len(engines)
    for _ in range(3):
        for number, engine in enumerate(engines):
            start = time.perf_counter()
            engine.predict_columns(timed)
            seconds[number] = min(seconds[number], time.perf_counter() - start)
    return [len(timed) / each for each in seconds]
