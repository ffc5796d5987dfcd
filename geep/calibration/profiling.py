"""Learn from all exits of a trained model: exit table, temperatures, criterion. Promises are not known here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from geep.backends import TokenBatch
from geep.calibration.quantising import check_quantised
from geep.calibration.runs import ExitRun, Outcomes, check_labels
from geep.data import Split
from geep.engine import Engine, ExitSettings
from geep.exits import AGREEMENT, AgreementScore, ExitProfile, fit_agreement_score, fit_temperature
from geep.predictor import PREDICTORS, ExitPredictor, Lexical, TextExits, fit_predictor
from geep.progress import Progress, no_progress

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
            "scores_calibrated": self.scores_calibrated,
            "predictor": predictor.kind if predictor else None,
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
        progress: Told what is being done, how much is done and how much there is.

    Raises:
        ValueError: If either split is empty, labels are not the model's, the criterion is unknown, or a quantised
            engine answers otherwise than its float32 model too often.
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
    check_quantised(held, multi_label=engine.multi_label)
    if isinstance(seen, Split):
        # Training texts fill the table with where exits are sure, not with whether they are right.
        seen = ExitRun.of(engine, seen, what="all exits, training texts", progress=progress, with_reference=False)
    depths, many = engine.depths, engine.multi_label

    progress("temperatures, criterion, exit table", 0, 1)
    config = engine.model.encoder.config
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
            lexical=lexical,
        )

    # The lexical exit does not depend on where the exits are, but they on it: the criterion reads its logits.
    nowhere = [torch.zeros(len(run), len(TABLE_SPEEDS), dtype=torch.int64) for run in (seen, held)]
    draft = fit(next(iter(PREDICTORS)), nowhere, None)
    settings = _fit_settings(Outcomes(engine.replace(predictor=draft, settings=ExitSettings()), held), criterion)
    drafted = engine.replace(predictor=draft, settings=settings)
    seen_profile, held_profile = (Outcomes(drafted, run).profile(settings).from_depth(1) for run in (seen, held))
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
    full = run.exit_logits[-1].float()
    soft = torch.sigmoid(full) if multi_label else torch.softmax(full, dim=-1)
    if run.labels is None:
        return soft
    gold = run.labels if multi_label else F.one_hot(run.labels, full.shape[1])
    return torch.lerp(soft, gold.float(), LABEL_SHARE)


def _fit_settings(held: Outcomes, criterion: str) -> ExitSettings:
    """Temperatures of all depths, and agreement scores if they are the criterion, from held-out texts.

    Without labels the scores of an exit are fitted to the full model's scores, not to its answers: by those it is
    always right, and the surer all scores are, the better they would fit.
    """
    many, target = held.engine.multi_label, held.run.labels
    if target is None:
        full = held.full_logits.float()
        target = torch.sigmoid(full) if many else torch.softmax(full, dim=-1)
    temperatures = {
        depth: fit_temperature(each, target, multi_label=many)
        for depth, each in zip(held.depths, held.logits, strict=True)
    }
    if held.run.labels is None and held.run.reference is None:
        temperatures[held.depths[-1]] = 1.0  # what a fit comes near to: speed 0 gives the full model's own scores
    return ExitSettings(
        criterion=criterion,
        temperatures=temperatures,
        agreement=fit_agreement(held) if criterion == AGREEMENT else {},
    )


def fit_agreement(held: Outcomes) -> dict[int, AgreementScore]:
    """Learn the criterion "agreement" for every exit, and the lexical one, on texts the model was not trained on."""
    agrees, lexical = held.profile(ExitSettings()).agrees, held.lexical_logits
    return {
        depth: fit_agreement_score(
            held.logits[column],
            None if depth == 0 else lexical,
            agrees[:, column],
            multi_label=held.engine.multi_label,
        )
        for column, depth in enumerate(held.depths[:-1])
    }


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
