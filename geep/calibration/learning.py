"""What is learned of the exits of held-out texts: fused answers, temperatures, agreement scores.

Read `learn_settings`. Which of it serves a promise best is not known here.
"""

from __future__ import annotations

from dataclasses import replace

from geep.calibration.runs import Outcomes
from geep.engine import ExitSettings
from geep.exits import (
    AGREEMENT,
    AgreementScore,
    fit_agreement_score,
    fit_fusing,
    fit_temperature,
    probabilities_of,
)


def learn_settings(
    held: Outcomes, criterion: str, *, by_labels: bool, fuse: bool = True, fuse_last: bool = False
) -> ExitSettings:
    """Learn of every depth what is answered there and how sure that is, from texts that the model was not trained on.

    Without labels it is learned by the full model's scores and not by its answers: by those it is always right, and
    the surer all scores are, the better they would fit.

    Args:
        held: All exits of the texts.
        criterion: "agreement", for which scores are learned too, or a row of `CRITERIA`.
        by_labels: Whether labels say what is right, else the full model's scores.
        fuse: Whether exits answer together with the table, where there is one that has learned labels.
        fuse_last: Whether all layers do, too: then the last answer is no longer the full model's.

    Returns:
        Settings at speed 0.

    Raises:
        ValueError: If the texts have no labels and `by_labels` asks for them.
    """
    many, target, lexical = held.engine.multi_label, held.run.labels, held.lexical_logits
    if not by_labels:
        target = probabilities_of(held.full_logits.float(), multi_label=many)
    if target is None:
        raise ValueError("The texts have no labels, expected some to learn by; learn by the full model's scores.")
    settings = ExitSettings()
    if lexical is not None and fuse:
        fused = [depth for depth in held.depths if depth > 0][: None if fuse_last else -1]
        columns = {depth: held.logits[held.depths.index(depth)] for depth in fused}
        weights = {depth: fit_fusing(each, lexical, target, multi_label=many) for depth, each in columns.items()}
        settings = replace(settings, fusing=weights)
    answers, last = held.answers(replace(settings, speed=1.0)), held.depths[-1]
    # The last temperature is that of the full model by itself, which is what answers at speed 0.
    asked = dict(zip(held.depths, [*answers[:-1], held.logits[-1]], strict=True))
    temperatures = {depth: fit_temperature(each, target, multi_label=many) for depth, each in asked.items()}
    if not by_labels and held.run.reference is None:
        temperatures[last] = 1.0  # what a fit comes near to: speed 0 gives the full model's own scores
    if last in settings.fusing:
        settings = replace(settings, fusing={**settings.fusing, last: settings.fusing[last].scaled(temperatures[last])})
    settings = replace(settings, temperatures=temperatures)
    agreement = fit_agreement(held, settings) if criterion == AGREEMENT else {}
    return replace(settings, criterion=criterion, agreement=agreement)


def fit_agreement(held: Outcomes, settings: ExitSettings) -> dict[int, AgreementScore]:
    """Learn the criterion "agreement" for every exit, and the lexical one, on texts the model was not trained on.

    Args:
        held: All exits of the texts.
        settings: What is answered at the exits: their `fusing` counts.
    """
    asked = replace(settings, speed=1.0, criterion="entropy")
    agrees, answers, lexical = held.profile(asked).agrees, held.answers(asked), held.lexical_logits
    return {
        depth: fit_agreement_score(
            answers[column],
            None if depth == 0 else lexical,
            agrees[:, column],
            multi_label=held.engine.multi_label,
        )
        for column, depth in enumerate(held.depths[:-1])
    }
