"""Stages handed to Hugging Face's Trainer, one after another, going on after a stop.

Mixed precision, several devices (one process each), checkpoints and resuming are the Trainer's.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from geep.modeling.devices import usable_device
from geep.modeling.model import GeepForSequenceClassification
from geep.progress import Progress, no_progress
from geep.training.checkpoints import Ledger, discard_checkpoints, last_checkpoint, stage_folders, state_of
from geep.training.losses import full_model_loss
from geep.training.metrics import DevMetrics, judge, metrics_of
from geep.training.recipes import RECIPES, Stage
from geep.training.rows import lengths_of
from geep.training.settings import TrainSettings
from geep.training.standardising import standardise_heads

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What training did.

    Attributes:
        steps: Steps of the optimizer, those before an interruption included.
        seconds: Seconds spent since the last interruption.
        logs: The Trainer's log of each stage.
        dev: The full model on the development rows; None where there were none.
        was_finished: Whether all of this was done before, by a call that finished the folder.
        exit_agreements: Of fitted exits, by layer: the share of texts that they did not learn from which they answer as
            the full model does. None where none was fitted.
        num_fitted: Texts that exits were fitted on.
    """

    steps: int
    seconds: float
    logs: tuple[Mapping[str, Any], ...]
    dev: DevMetrics | None = None
    was_finished: bool = False
    exit_agreements: Mapping[int, float] | None = None
    num_fitted: int = 0

    @property
    def learned_nothing(self) -> str | None:
        """That the model has learned nothing, in a sentence; None where it has, or where it was not looked at."""
        return None if self.dev is None else self.dev.learned_nothing


class _StageTrainer(Trainer):
    """Hugging Face's Trainer with a stage's loss, lengths that need not be counted, and the full model judged."""

    loss_is_scaled_for_ga = False

    def __init__(self, *, args: TrainingArguments, stage: Stage, problem_type: str | None, **kwargs: Any) -> None:
        if args.n_gpu > 1:
            # In one process the Trainer would split batches over the GPUs (DataParallel) and join the outputs along
            # their first axis, which is the exits'. Several GPUs take one process each: torchrun, accelerate launch.
            args._n_gpu = 1
        several = problem_type == "multi_label_classification"
        super().__init__(
            args=args,
            compute_metrics=self._judge,
            preprocess_logits_for_metrics=_labels_that_hold if several else _likeliest_label,
            **kwargs,
        )
        self.stage = stage
        self.problem_type = problem_type

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs.pop("labels")
        if not model.training:  # development rows
            output = model(**inputs)
            loss = full_model_loss(output, labels, self.problem_type)
            return (loss, output) if return_outputs else loss
        if self.stage.trains == "exits":
            # The Trainer puts the whole model into training mode at every step; a frozen teacher has no dropout.
            bare = self.accelerator.unwrap_model(model)
            bare.encoder.train(mode=False)
            bare.teacher.train(mode=False)
        output = model(**inputs, **(self.stage.needs or {}))
        loss = self.stage.loss_after(self.state.global_step)(output, labels, self.problem_type)
        return (loss, output) if return_outputs else loss

    def _judge(self, prediction: EvalPrediction) -> dict[str, float]:
        measures = judge(prediction.predictions, prediction.label_ids)  # type: ignore[arg-type]
        score = measures.get("micro_f1", measures["accuracy"])
        # Among equals the last epoch is kept, whose exits have learned longest: less than one answer tips the scales.
        return {**measures, "score": score + 1e-9 * float(self.state.epoch or 0.0)}

    # The Trainer asks data sets of the `datasets` library for a column of lengths, and reads all rows of any other.

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths=lengths_of(rows)
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        # Drawn from a generator of its own, as the Trainer does it.
        generator = torch.Generator().manual_seed(self.args.seed)
        return LengthGroupedSampler(self.args.eval_batch_size, lengths=lengths_of(eval_dataset), generator=generator)


def _likeliest_label(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def _labels_that_hold(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits > 0).to(torch.int8)


class _Padder(DataCollatorWithPadding):
    """Pads a batch to its longest row, and to one column where no row has a token: attention over none is undefined."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if any(len(row["input_ids"]) for row in features):
            return super().__call__(features)
        return DataCollatorWithPadding(self.tokenizer, padding="max_length", max_length=1)(features)


class _Reporter(TrainerCallback):
    """Passes the Trainer's steps on."""

    def __init__(self, progress: Progress, stage: str) -> None:
        self.progress = progress
        self.stage = stage

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress(f"training, {self.stage}", state.global_step, state.max_steps)


def run_recipe(
    model: GeepForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    settings: TrainSettings,
    checkpoint_dir: str | Path,
    dev: Rows | None = None,
    device: str | None = None,
    progress: Progress = no_progress,
    callbacks: Sequence[TrainerCallback] = (),
    keep_checkpoints: bool = False,
) -> TrainResult:
    """Train `model` in place by the stages of a recipe.

    Invariant: interrupted after any checkpoint (one an epoch), the same call goes on from there and ends with the same
    weights. With development rows the weights are those of the best epoch of each stage that trains the full model.
    Exits that a recipe fits when its stages are done are not fitted here.

    Args:
        model: Model with exits (or without, for a recipe that has none).
        tokenizer: Pads the batches.
        rows: Training rows of `encode`.
        settings: See `TrainSettings`.
        checkpoint_dir: Where checkpoints live while training runs.
        dev: Rows to judge the full model by after every epoch. None: the last epoch's weights are taken.
        device: "cpu" keeps training off a GPU; None: what the Trainer finds.
        progress: Told the steps of each stage.
        callbacks: Passed to the Trainer.
        keep_checkpoints: Whether they stay when all stages are done, so that a process killed before it has saved the
            model finds them; `discard_checkpoints` deletes them.

    Raises:
        ValueError: If the checkpoints there are of another training, or there are no rows, or the model has no exits
            and the recipe trains some.
    """
    recipe = RECIPES[settings.recipe]
    if not len(rows):
        raise ValueError("No training rows; expected at least one text with a label.")
    if device is not None:
        usable_device(device)
    if recipe.trains_exits and not len(model.exits):
        raise ValueError(
            f"Recipe {settings.recipe!r} trains exits, but this encoder of {model.config.num_hidden_layers} layers "
            "has none; use recipe 'vanilla' or give exit_layers."
        )
    if dev is not None and not len(dev):
        dev = None
    folder = Path(checkpoint_dir).resolve()  # the Trainer notes where its best checkpoint is
    folders = stage_folders(folder, recipe)
    Ledger.of(model, rows, dev, settings).open(folder)
    # A copy: classifiers read a text's first token, and whoever pads at the left for other models keeps doing so.
    padder = copy.deepcopy(tokenizer)
    padder.padding_side = "right"
    collate = _Padder(padder)
    if settings.standardise and not any(map(last_checkpoint, folders)):
        standardise_heads(model, collate, rows)
    steps, seconds, logs, metrics = 0, 0.0, [], None
    for number, (stage, stage_folder) in enumerate(zip(recipe.stages, folders, strict=True)):
        judged = dev if stage.trains == "all" else None  # exits do not move the full model
        found = last_checkpoint(stage_folder)
        if any(map(last_checkpoint, folders[number + 1 :])):
            logger.info("Stage %s is done: a later stage has a checkpoint.", stage.name)
            if found is None:
                continue
            state = state_of(found)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(stage.trains == "all" or name.startswith("exits."))
            args = _arguments(stage, settings, stage_folder, device=device, has_dev=judged is not None)
            trainer = _StageTrainer(
                model=model,
                args=args,
                train_dataset=rows,
                eval_dataset=judged,
                data_collator=collate,
                processing_class=tokenizer,
                callbacks=list(callbacks),
                optimizers=(_optimizer(model, stage, settings, args), None),
                stage=stage,
                problem_type=model.config.problem_type,
            )
            if args.disable_tqdm:
                trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_Reporter(progress, stage.name))
            seconds += float(trainer.train(resume_from_checkpoint=found).metrics.get("train_runtime", 0.0))
            state = trainer.state
        steps += state.global_step
        logs += [{"stage": stage.name, **entry} for entry in state.log_history]
        if judged is not None:
            metrics = _best(state)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train(mode=False)
    if not keep_checkpoints and PartialState().is_main_process:
        discard_checkpoints(folder, recipe)
    return TrainResult(steps=steps, seconds=seconds, logs=tuple(logs), dev=metrics)


def _best(state: TrainerState) -> DevMetrics | None:
    """The measures of the epoch whose weights were kept."""
    for entry in state.log_history:
        if "eval_score" in entry and entry["step"] == state.best_global_step:
            return metrics_of(entry)
    return None


def _arguments(
    stage: Stage, settings: TrainSettings, folder: Path, *, device: str | None, has_dev: bool
) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs * stage.epochs_scale,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": _peak_rate(stage, settings),
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "train_sampling_strategy": "group_by_length",
        "bf16": settings.bf16,
        "use_cpu": device == "cpu" or not torch.accelerator.is_available(),
        "seed": settings.seed,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_steps": 20,
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    if has_dev:
        chosen |= {
            "eval_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            "greater_is_better": True,
            # With one, the Trainer would end by deleting the last checkpoint if it is not the best one: killed before
            # the model is saved, some epochs would have to be run again.
            "save_total_limit": 2,
        }
    return TrainingArguments(**(chosen | dict(settings.arguments)))


def _peak_rate(stage: Stage, settings: TrainSettings) -> float:
    base = RECIPES[settings.recipe].learning_rate if settings.learning_rate is None else settings.learning_rate
    return base * stage.learning_rate_scale


def _optimizer(
    model: GeepForSequenceClassification, stage: Stage, settings: TrainSettings, args: TrainingArguments
) -> torch.optim.Optimizer:
    """AdamW with a faster rate for the fresh heads (in the joint stages) and no decay on biases and norms."""
    rate = _peak_rate(stage, settings)
    head_rate = rate * (settings.head_learning_rate_scale if stage.trains == "all" else 1.0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            key = (rate if name.startswith("encoder.") else head_rate, decay)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()],
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,  # on CPU ten times faster than the default loop over tensors: 41 against 427 ms for 40 M parameters
    )
