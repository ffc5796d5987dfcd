"""Learn from all exits of a trained model: exit table, temperatures, criterion. Promises are not known here."""

from __future__ import annotations

import logging
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from geep.backends import TokenBatch
from geep.calibration.learning import learn_settings
from geep.calibration.quantising import check_rounded
from geep.calibration.runs import ExitRun, Outcomes, check_labels
from geep.data import Split
from geep.engine import Engine, ExitSettings
from geep.exits import AGREEMENT, ExitProfile, probabilities_of
from geep.predictor import MAX_NGRAMS, PREDICTORS, ExitPredictor, Lexical, TextExits, fit_predictor
from geep.progress import Progress, no_progress

logger = logging.getLogger(__name__)

Integers = NDArray[np.int64]

# Speeds for which the table holds counts; a run takes the nearest. Dense where probabilities of disagreement live.
TABLE_SPEEDS: tuple[float, ...] = (0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)


# Chosen on held-out texts of SST-2 and AG News. Without labels a little fewer answers are right, with labels alone many
# more differ from the full model's.
LABEL_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class PredictorQuality:
    """How well exit layers are foretold, at one speed, on texts that filled no table.

    Attributes:
        kind: Row of `PREDICTORS`, or "constant" or "length".
        speed: The speed at which the true exit layers were taken.
        rank_correlation: Spearman's, of the score with the true exit layer; 0 for a constant.
        mean_absolute_error: Of the predicted (median) layer, in layers.
        early_share: Share of texts predicted above (before) their true exit.
    """

    kind: str
    speed: float
    rank_correlation: float
    mean_absolute_error: float
    early_share: float


@dataclass(frozen=True, slots=True)
class ProfileResult:
    """What `profile` found.

    Attributes:
        engine: The engine with its table, criterion and temperatures; its speed is still 0.
        quality: Of the predictors that were tried, on the held-out texts.
        heldout: The held-out texts' run, which `calibrate` can choose settings on without running them again.
        mean_exit_layers: Mean exit layer at each of `TABLE_SPEEDS`, on training and on held-out texts: exits of
            training texts are too early, which is why levels and promises come from held-out ones.
    """

    engine: Engine
    quality: tuple[PredictorQuality, ...]
    heldout: ExitRun
    mean_exit_layers: tuple[tuple[float, float, float], ...]

    @property
    def scores_calibrated(self) -> bool:
        """Whether scores mean how often answers are right; without labels they are the full model's own."""
        return self.heldout.labels is not None

    def record(self) -> dict[str, Any]:
        """Return in plain words and numbers what is kept of it in `calibration.json`."""
        settings, predictor = self.engine.settings, self.engine.predictor
        return {
            "criterion": settings.criterion,
            "temperatures": {str(depth): round(value, 4) for depth, value in settings.temperatures.items()},
            "fusing": {str(depth): [round(each, 4) for each in astuple(w)] for depth, w in settings.fusing.items()},
            "scores_calibrated": self.scores_calibrated,
            "predictor": predictor.kind if predictor else None,
            "made_with": self.engine.deployment.made_with,
            "quality": [asdict(row) for row in self.quality],
            "mean_exit_layers": [
                {"speed": speed, "training_texts": seen, "heldout_texts": fresh}
                for speed, seen, fresh in self.mean_exit_layers
            ],
        }

    def save(self, folder: str | Path) -> None:
        """Write table and settings into a model folder; what was certified for another table is no longer in it."""
        self.engine.save_exits(folder, record={"profile": self.record()})


def profile(
    engine: Engine,
    train: Split | ExitRun,
    heldout: Split | ExitRun,
    *,
    kind: str | None = None,
    criterion: str = AGREEMENT,
    ngram_order: int = 2,
    max_ngrams: int = MAX_NGRAMS,
    progress: Progress = no_progress,
) -> ProfileResult:
    """Run all exits over texts and learn temperatures, criterion, exit table and lexical exit from them.

    Args:
        engine: Engine of a trained model; its table and settings are replaced.
        train: Texts that fill the table and teach the lexical exit, by the full model's probabilities and, if there,
            by their labels; or their run.
        heldout: Texts the model was not trained on, or their run: temperatures, agreement scores and levels come from
            them.
        kind: Row of `PREDICTORS`; None: the one whose scores rank the held-out texts best.
        criterion: "agreement", or a row of `CRITERIA`.
        ngram_order: Longest n-gram of the table's keys.
        max_ngrams: Most n-grams that get a row in the table: the most frequent ones.
        progress: Told what is being done, how much is done and how much there is.

    Raises:
        ValueError: If either split is empty, labels are not the model's, or the criterion is unknown.
        RoundedTooFarError: If a rounded engine (bfloat16, int8) answers otherwise than its float32 model too often.
    """
    if len(engine.depths) < 2:
        raise ValueError(
            "The model has no exits, so there is nothing to profile; train it with a recipe that has some."
        )
    for name, texts in (("training", train), ("held-out", heldout)):
        if not len(texts):
            raise ValueError(f"No {name} texts to profile; expected at least one (a few hundred for a useful table).")
        if isinstance(texts, Split):
            check_labels(engine, texts)
    ExitSettings(criterion=criterion)  # refuses an unknown one before any work is done
    held, seen = heldout, train
    if isinstance(held, Split):
        held = ExitRun.of(engine, held, what="all exits, held-out texts", progress=progress)
    check_rounded(held, engine.deployment.dtype, multi_label=engine.multi_label)
    if isinstance(seen, Split):
        # Training texts fill the table with where exits are sure, not with whether they are right.
        seen = ExitRun.of(engine, seen, what="all exits, training texts", progress=progress, with_reference=False)
    depths, many = engine.depths, engine.multi_label

    progress("temperatures, criterion, exit table", 0, 1)
    config, separator_id = engine.model.encoder.config, _separator_id(engine)
    taught = label_targets(seen, multi_label=many)

    def fit(name: str, exits: list[Tensor], lexical: Lexical | None) -> ExitPredictor:
        return fit_predictor(
            name,
            TextExits(*seen.flat, exits[0]),
            taught,
            TextExits(*held.flat, exits[1]),
            depths=depths,
            speeds=TABLE_SPEEDS,
            num_labels=len(engine.label_names),
            vocab_size=config.vocab_size,
            special_ids=sorted(set(engine.tokenizer.all_special_ids)),
            multi_label=many,
            ngram_order=ngram_order,
            max_ngrams=max_ngrams,
            lexical=lexical,
            separator_id=separator_id,
        )

    # The lexical exit does not depend on where the exits are, but they on it: the criterion reads its logits.
    nowhere = [torch.zeros(len(run), len(TABLE_SPEEDS), dtype=torch.int64) for run in (seen, held)]
    draft = fit(next(iter(PREDICTORS)), nowhere, None)
    judged = Outcomes(engine.replace(predictor=draft, settings=ExitSettings()), held)
    settings = learn_settings(judged, criterion, by_labels=held.labels is not None)
    # Which exits are asked does not depend on the speed, but at speed 0 none is.
    asked, drafted = replace(settings, speed=1.0), engine.replace(predictor=draft, settings=settings)
    seen_profile, held_profile = (Outcomes(drafted, run).profile(asked).from_depth(1) for run in (seen, held))
    exits = [_exit_grid(seen_profile), _exit_grid(held_profile)]
    fitted = {name: fit(name, exits, draft.lexical) for name in ([kind] if kind is not None else PREDICTORS)}
    quality = {
        name: [predictor_quality(held_profile, held.batch, predictor, speed) for speed in TABLE_SPEEDS]
        for name, predictor in fitted.items()
    }
    best = max(fitted, key=lambda name: float(np.mean([row.rank_correlation for row in quality[name]])))
    table_layers = np.asarray(depths)
    progress("temperatures, criterion, exit table", 1, 1)
    return ProfileResult(
        engine=engine.replace(predictor=fitted[best], settings=settings),
        quality=tuple(row for rows in quality.values() for row in rows),
        heldout=held,
        mean_exit_layers=tuple(
            (speed, float(table_layers[known].mean()), float(table_layers[fresh].mean()))
            for speed, known, fresh in zip(TABLE_SPEEDS, *(part.T.numpy() for part in exits), strict=True)
        ),
    )


def label_targets(run: ExitRun, *, multi_label: bool) -> Tensor:
    """What the lexical exit is taught: the full model's probabilities, a quarter labels where there are some.

    The full model says of a text how near each label is, of texts without labels, too. Of those that it was trained
    on it says hardly more than their labels, and still teaches more than these.

    Returns:
        Shape (num_texts, num_labels).
    """
    soft = probabilities_of(run.exit_logits[-1].float(), multi_label=multi_label)
    if run.labels is None:
        return soft
    gold = run.labels if multi_label else F.one_hot(run.labels, soft.shape[1])
    return torch.lerp(soft, gold.float(), LABEL_SHARE)


def _separator_id(engine: Engine) -> int | None:
    """The id that parts the texts of a pair; None for a model of single texts, whose table compares nothing."""
    if not engine.text_pairs:
        return None
    found: int | None = engine.tokenizer.sep_token_id
    if found is None:
        logger.warning(
            "The tokenizer names no sep_token, expected the one between the texts of a pair: the exit table cannot "
            "tell what both texts have, and predicts less; set sep_token in tokenizer_config.json."
        )
    return found


def predictor_quality(
    profile: ExitProfile, batch: TokenBatch, predictor: ExitPredictor, speed: float
) -> PredictorQuality:
    """Compare predicted exit layers with those that the exits themselves choose at a speed."""
    actual = profile.from_depth(1).exit_layers(speed)
    found = predictor.predict(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths), speed=speed)
    return layer_quality(predictor.kind, speed, found.scores.numpy(), found.exit_layers.numpy(), actual)


def layer_quality(
    kind: str, speed: float, scores: NDArray[Any], predicted: Integers, actual: Integers
) -> PredictorQuality:
    """Score predicted layers (num_texts,) and the scores behind them against the true ones."""
    varies = len(np.unique(scores)) > 1 and len(np.unique(actual)) > 1
    return PredictorQuality(
        kind=kind,
        speed=speed,
        rank_correlation=float(spearmanr(scores, actual).statistic) if varies else 0.0,
        mean_absolute_error=float(np.abs(predicted - actual).mean()),
        early_share=float((predicted < actual).mean()),
    )


def _exit_grid(profile: ExitProfile) -> Tensor:
    """Column of each text's exit at each of `TABLE_SPEEDS`, (num_texts, num_speeds)."""
    return torch.from_numpy(np.stack([profile.exit_indices(speed) for speed in TABLE_SPEEDS], axis=1))
