"""Names of a classifier's labels, read of its config. What the model is made of is not known here."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

_PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification")


def label_names_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Names of a model's labels, by id.

    Raises:
        ValueError: If `id2label` does not name each of 0 … num_labels - 1, or two labels have one name, or a name is no
            string; or if `problem_type` is none that is known here.
    """
    if config.problem_type not in _PROBLEM_TYPES:
        raise ValueError(
            f"problem_type of config.json is {config.problem_type!r}, expected one of {list(_PROBLEM_TYPES[1:])}; "
            "train a classifier."
        )
    names: dict[Any, Any] = dict(config.id2label or {})
    if sorted(names, key=str) != sorted(range(len(names)), key=str) or not names:
        raise ValueError(
            f"id2label of config.json has the ids {sorted(names, key=str)}, expected 0..{max(len(names) - 1, 0)}; "
            "number the labels from 0."
        )
    found = tuple(names[label] for label in range(len(names)))
    unnamed = [name for name in found if not isinstance(name, str)]
    if unnamed:
        raise ValueError(f"id2label of config.json names labels {unnamed}, expected strings; write them in quotes.")
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ValueError(
            f"id2label of config.json gives several labels the name {twice}; scores are told by name, so give each "
            "label its own."
        )
    return found
