"""Worker: TF-IDF and logistic regression, what somebody in a hurry takes in BERT's place.

n-grams of words or of characters, and the strength of regularisation, are chosen by cross-validation on the rows that
the full model was made of; then all of them are learned from.
"""

from __future__ import annotations

from itertools import product

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from worker import Job, Loaded, encoderless_way, serve, versions

NGRAMS = {"words, 1-2": ("word", (1, 2)), "characters, 1-4": ("char_wb", (1, 4))}
STRENGTHS = (1.0, 4.0, 16.0)
FOLDS = 3


def load(job: Job) -> Loaded:
    """Choose, learn, and offer it."""
    if not job.labelled_texts:
        raise ValueError("The rows that the full model was made of have no labels to learn from.")
    scores = {
        choice: cross_val_score(classifier(*choice), job.labelled_texts, job.labelled, cv=FOLDS, n_jobs=1).mean()
        for choice in product(NGRAMS, STRENGTHS)
    }
    best = max(scores, key=lambda choice: scores[choice])
    model = classifier(*best).fit(job.labelled_texts, job.labelled)

    way = encoderless_way(
        job,
        lambda texts: model.predict(texts).tolist(),
        name="TF-IDF, logistic regression",
        group="lexical",
        setting=f"{best[0]}, C {best[1]:g}",
    )
    return [way], versions("scikit-learn"), {"cross_validated": {f"{k}, C {c:g}": v for (k, c), v in scores.items()}}


def classifier(ngrams: str, strength: float) -> Pipeline:
    """One that has learned nothing yet."""
    analyzer, span = NGRAMS[ngrams]
    features = TfidfVectorizer(analyzer=analyzer, ngram_range=span, sublinear_tf=True, min_df=2, max_features=1 << 20)
    return make_pipeline(features, LogisticRegression(C=strength, max_iter=300))


if __name__ == "__main__":
    serve(load)
