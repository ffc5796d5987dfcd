"""Arguments of Hugging Face's Trainer that a user may set beside geep's settings, and those that geep sets."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_GEEPS_OWN_OPTIMIZER = "nothing: geep makes an AdamW with its own rates (learning_rate, head_learning_rate_scale)"
_EVERY_EPOCH = "nothing: a checkpoint is written, and judged on the development rows, after every epoch"

# What would contradict one of geep's settings, break resuming, or have no effect: field, and what to use instead.
TAKEN: dict[str, str] = {
    "output_dir": "the output folder of train, or checkpoint_dir of run_recipe",
    "num_train_epochs": "TrainSettings.epochs",
    "per_device_train_batch_size": "TrainSettings.batch_size",
    "gradient_accumulation_steps": "TrainSettings.gradient_accumulation",
    "learning_rate": "TrainSettings.learning_rate",
    "warmup_steps": "TrainSettings.warmup",
    "warmup_ratio": "TrainSettings.warmup",
    "weight_decay": "TrainSettings.weight_decay",
    "max_grad_norm": "TrainSettings.max_grad_norm",
    "bf16": "TrainSettings.bf16",
    "seed": "TrainSettings.seed",
    "use_cpu": "device='cpu'",
    "optim": _GEEPS_OWN_OPTIMIZER,
    "optim_args": _GEEPS_OWN_OPTIMIZER,
    "optim_target_modules": _GEEPS_OWN_OPTIMIZER,
    "label_smoothing_factor": "nothing: the loss is the recipe's",
    "label_names": "nothing: they are the model's",
    "remove_unused_columns": "nothing: rows have no columns but the model's",
    "eval_strategy": _EVERY_EPOCH,
    "eval_steps": _EVERY_EPOCH,
    "save_strategy": _EVERY_EPOCH,
    "save_steps": _EVERY_EPOCH,
    "save_only_model": _EVERY_EPOCH,
    "save_total_limit": "nothing: the last checkpoint and the best one are kept",
    "load_best_model_at_end": "the development rows: with them the best checkpoint is kept",
    "metric_for_best_model": "nothing: accuracy chooses, or micro F1 where a row has several labels",
    "greater_is_better": "nothing: accuracy chooses, or micro F1 where a row has several labels",
    "prediction_loss_only": "nothing: the development rows are judged by the answers",
    "batch_eval_metrics": "nothing: the development rows are judged all at once",
    "eval_on_start": "nothing: a model with fresh heads is no candidate",
    "resume_from_checkpoint": "the same call again: it goes on from the last checkpoint",
}


def checked_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments as JSON knows them.

    Raises:
        ValueError: If `TrainingArguments` has no such field, geep sets it from something else, or a value is no JSON.
    """
    if not arguments:
        return {}
    for name in arguments:
        if name in TAKEN:
            raise ValueError(f"{name!r} of TrainingArguments is geep's to set; use {TAKEN[name]}.")
    from transformers import TrainingArguments

    known = [field.name for field in fields(TrainingArguments) if field.init]
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, [field for field in known if field not in TAKEN], n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see Hugging Face's documentation."
            raise ValueError(f"TrainingArguments has no field {name!r}; {hint}")
    try:
        return dict(json.loads(json.dumps(dict(arguments))))
    except TypeError as error:
        raise ValueError(
            f"arguments are kept with the model as JSON, so values are words, numbers, lists and objects: {error}."
        ) from error
