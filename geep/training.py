"""Training: losses, recipes made of stages, and `train`, which hands a stage to Hugging Face's Trainer.

Read in this order: the losses (pure functions of an `ExitOutput`), `RECIPES`, `train`. The room knows nothing of
files, tables or thresholds. Mixed precision, several devices (one process each), checkpoints and resuming are the
Trainer's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from geep.modeling import ExitOutput, GeepForSequenceClassification, first_linear, label_loss, standardise_input

logger = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------------------------
# Losses: (what the model returned, labels, problem type) -> scalar
# --------------------------------------------------------------------------------------------------------------------

Loss = Callable[[ExitOutput, Tensor, str | None], Tensor]


def distillation(teacher_logits: Tensor, student_logits: Tensor, problem_type: str | None) -> Tensor:
    """KL(teacher ‖ student) per text, averaged over the batch, no gradient to the teacher; temperature 1.

    For multi-label problems each label is a two-way distribution and the divergences are summed over labels.
    """
    target = teacher_logits.detach()
    if problem_type == "multi_label_classification":
        p = torch.sigmoid(target)
        cross = F.binary_cross_entropy_with_logits(student_logits, p, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(target, p, reduction="none")
        return (cross - entropy).sum(-1).mean()
    return F.kl_div(
        F.log_softmax(student_logits, dim=-1), F.log_softmax(target, dim=-1), reduction="batchmean", log_target=True
    )


def shared_exit_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """The paper's one-step loss (Li et al. 2024): the teacher learns the labels behind every depth, exits follow it.

    Mean over the full model and every sub-network k of CE(teacher(last layer(h_k)), y), plus the mean over exits of
    KL(full model ‖ exit k). The KL reaches the encoder; the exits see no labels.

    The public code adds the terms, unweighted. Averaged they keep their directions at a scale that does not grow with
    the number of exits, so that one learning rate and one clipping norm serve encoders of any depth.
    """
    hard, soft = _shared_terms(output, labels, problem_type)
    return hard.mean() + soft.mean()


def guided_shared_exit_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """The shared exit loss with two changes that let it start: the default (docs/results.md compares).

    The full model's own term counts as much as those of all sub-networks together, instead of as one among them: their
    shallow inputs dominate the first hundreds of steps, in which the full model would learn little and the exits would
    follow a teacher that knows nothing. And the exits see the labels, too, until there is a teacher worth following.
    """
    hard, soft = _shared_terms(output, labels, problem_type)
    exits = _required(output.exit_logits)
    guide = torch.stack([label_loss(logits, labels, problem_type) for logits in exits[:-1]])
    return hard[-1] + hard[:-1].mean() + soft.mean() + guide.mean()


def _shared_terms(output: ExitOutput, labels: Tensor, problem_type: str | None) -> tuple[Tensor, Tensor]:
    """CE of every sub-network and, last, of the full model (num_exits + 1,); KL of every exit (num_exits,)."""
    shared, exits = _required(output.shared_exit_logits), _required(output.exit_logits)
    hard = torch.stack([label_loss(logits, labels, problem_type) for logits in shared])
    return hard, torch.stack([distillation(exits[-1], logits, problem_type) for logits in exits[:-1]])


def full_model_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """Loss of the full model alone: plain fine-tuning."""
    return label_loss(_required(output.logits), labels, problem_type)


def distillation_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """FastBERT's second step (Liu et al. 2020): sum over exits of KL(full model ‖ exit); uses no labels."""
    exits = _required(output.exit_logits)
    return torch.stack([distillation(exits[-1], logits, problem_type) for logits in exits[:-1]]).sum()


def exit_label_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """DeeBERT's second step (Xin et al. 2020): sum over exits of the loss against the labels."""
    exits = _required(output.exit_logits)
    return torch.stack([label_loss(logits, labels, problem_type) for logits in exits[:-1]]).sum()


def weighted_joint_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """PABEE's loss (Zhou et al. 2020): every classifier against the labels, weighted by its place in the row."""
    losses = torch.stack([label_loss(logits, labels, problem_type) for logits in _required(output.exit_logits)])
    weights = torch.arange(1, len(losses) + 1, dtype=losses.dtype, device=losses.device)
    return (weights * losses).sum() / weights.sum()


def _required(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise ValueError("The model was run without the logits this loss reads; check the stage's `needs`.")
    return logits


# --------------------------------------------------------------------------------------------------------------------
# Recipes
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of the Trainer.

    Attributes:
        name: Name of the stage's folder of checkpoints.
        loss: What is minimised.
        trains: "all" parameters, or only the "exits" on a frozen encoder and teacher, which then run without dropout.
        needs: Arguments of the model's forward that make it return what the loss reads.
        epochs_scale: Epochs of this stage for each epoch asked for.
        learning_rate_scale: Learning rate of this stage for the rate asked for.
    """

    name: str
    loss: Loss
    trains: Literal["all", "exits"] = "all"
    needs: Mapping[str, bool] | None = None
    epochs_scale: float = 1.0
    learning_rate_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Stages run one after another, with a learning rate that suits them (docs/results.md has comparisons)."""

    stages: tuple[Stage, ...]
    learning_rate: float = 1e-4
    has_exits: bool = True


_EXITS: Mapping[str, bool] = {"output_exits": True}
_SHARED: Mapping[str, bool] = {"output_exits": True, "output_shared_exits": True}

RECIPES: dict[str, Recipe] = {
    "geep": Recipe((Stage("shared-exit", guided_shared_exit_loss, needs=_SHARED),)),
    "geep-paper": Recipe((Stage("shared-exit", shared_exit_loss, needs=_SHARED),)),
    "fastbert": Recipe(
        (
            Stage("fine-tune", full_model_loss),
            # FastBERT's own proportions: 3 epochs, then 5 at ten times the rate.
            Stage("distil", distillation_loss, "exits", _EXITS, epochs_scale=5 / 3, learning_rate_scale=10.0),
        )
    ),
    "deebert": Recipe(
        (
            Stage("fine-tune", full_model_loss),
            Stage("exits", exit_label_loss, "exits", _EXITS, learning_rate_scale=10.0),
        )
    ),
    "pabee": Recipe((Stage("joint", weighted_joint_loss, needs=_EXITS),)),
    "vanilla": Recipe((Stage("fine-tune", full_model_loss),), has_exits=False),
}


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)  # without slots the class still shows its defaults, which the command line reads
class TrainSettings:
    """How to train; every default has its home here.

    Attributes:
        recipe: Row of `RECIPES`.
        epochs: Passes over the training texts (scaled by a recipe's stages).
        batch_size: Texts per step and device.
        learning_rate: Peak rate of the encoder. None: the recipe's.
        head_learning_rate_scale: The fresh heads learn this many times faster than the pretrained encoder.
        warmup: Share of the steps in which the rate rises.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: Clipping norm.
        max_length: Longest text in tokens.
        bf16: Mixed precision; on CPUs with AVX-512 BF16 about twice as fast, too.
        seed: Seed of heads' dropout and data order.
        standardise: Start the heads from standardised features (see `standardise_heads`): without it the paper's
            recipe starts slowly, and so does plain fine-tuning of sentence encoders. False for heads trained already.
    """

    recipe: str = "geep"
    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float | None = None
    head_learning_rate_scale: float = 5.0
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 128
    bf16: bool = False
    seed: int = 42
    standardise: bool = True

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"Unknown recipe {self.recipe!r}; known: {sorted(RECIPES)}.")
        for name in ("epochs", "batch_size", "max_length", "head_learning_rate_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True)
class _Ledger:
    """What checkpoints were made of, kept beside them: a training with other settings or rows does not go on there."""

    made_of: Mapping[str, str]

    @classmethod
    def of(
        cls, model: GeepForSequenceClassification, rows: Sequence[Mapping[str, Any]], settings: TrainSettings
    ) -> _Ledger:
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
        config = {**model.config.to_dict(), "transformers_version": None}
        return cls(
            {
                "settings": json.dumps(asdict(settings), sort_keys=True),
                "model": json.dumps(config, sort_keys=True, default=str),
                "rows": digest.hexdigest(),
            }
        )

    def open(self, folder: Path) -> None:
        """Note what is trained, or check that it is what was begun.

        Raises:
            ValueError: If the folder holds checkpoints of another training.
        """
        path = folder / _LEDGER_FILE
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name, value in self.made_of.items() if before.get(name) != value]
            if other:
                raise ValueError(
                    f"{folder} holds checkpoints of a training with other {' and '.join(other)}. Go on with the same, "
                    "choose another folder, or delete it."
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.made_of), encoding="utf-8")

    def close(self, folder: Path) -> None:
        """Forget the training: it is done."""
        (folder / _LEDGER_FILE).unlink(missing_ok=True)


_LEDGER_FILE = "made_of.json"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What training did: steps run, seconds spent, and the Trainer's log of each stage."""

    steps: int
    seconds: float
    logs: tuple[Mapping[str, Any], ...]


class _StageTrainer(Trainer):
    """Hugging Face's Trainer with a stage's loss; nothing else is changed."""

    loss_is_scaled_for_ga = False

    def __init__(self, *, args: TrainingArguments, stage: Stage, problem_type: str | None, **kwargs: Any) -> None:
        if args.n_gpu > 1:
            # In one process the Trainer would split batches over the GPUs (DataParallel) and join the outputs along
            # their first axis, which is the exits'. Several GPUs take one process each: torchrun, accelerate launch.
            args._n_gpu = 1
        super().__init__(args=args, **kwargs)
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
        if self.stage.trains == "exits":
            # The Trainer puts the whole model into training mode at every step; a frozen teacher has no dropout.
            bare = self.accelerator.unwrap_model(model)
            bare.encoder.train(mode=False)
            bare.teacher.train(mode=False)
        output = model(**inputs, **(self.stage.needs or {}))
        loss = self.stage.loss(output, labels, self.problem_type)
        return (loss, output) if return_outputs else loss


def standardise_heads(
    model: GeepForSequenceClassification, collate: DataCollatorWithPadding, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Start every head from standardised features of the pretrained encoder, measured on some training rows.

    Changes only the heads' first linear layers; see `modeling.standardise_input`. Meant for fresh heads: on trained
    ones it would undo what they learned.
    """
    heads = [*model.exits, model.teacher]
    sums = {first_linear(head): torch.zeros(2, model.config.hidden_size, dtype=torch.float64) for head in heads}
    counts = dict.fromkeys(sums, 0)
    mask = torch.ones(0)

    def note(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0].detach().cpu().double()
        if features.ndim == 3:  # a head that reads tokens: padding does not count
            features = features[mask]
        sums[linear] += torch.stack([features.sum(0), features.square().sum(0)])  # type: ignore[index]
        counts[linear] += len(features)  # type: ignore[index]

    hooks = [first_linear(head).register_forward_pre_hook(note) for head in heads]
    was_training = model.training
    model.train(mode=False)
    with torch.no_grad():
        for start in range(0, min(len(rows), _STANDARDISE_ROWS), 32):
            batch = collate([dict(row) for row in rows[start : start + 32]])
            batch.pop("labels")
            mask = batch["attention_mask"].bool()
            model(**{name: value.to(model.device) for name, value in batch.items()}, output_exits=True)
    for hook in hooks:
        hook.remove()
    for head in heads:
        mean, square = sums[first_linear(head)] / max(counts[first_linear(head)], 1)
        spread = (square - mean.square()).clamp(min=0).sqrt()
        # A feature that hardly varies is not blown up; with a single row nothing varies and nothing is scaled.
        floor = 0.1 * float(spread.mean())
        spread = spread.clamp(min=floor) if floor > 1e-9 else torch.ones_like(spread)
        standardise_input(head, mean.float().to(model.device), spread.float().to(model.device))
    model.train(mode=was_training)


# Rows whose features are enough to measure a mean and a deviation by.
_STANDARDISE_ROWS = 512


class _Reporter(TrainerCallback):
    """Passes the Trainer's steps on."""

    def __init__(self, report: Callable[[str, float], None], stage: str) -> None:
        self.report = report
        self.stage = stage

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.report(self.stage, state.global_step / max(state.max_steps, 1))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[str] | Sequence[tuple[str, str]],
    labels: Any,
    *,
    max_length: int,
) -> list[dict[str, Any]]:
    """Turn texts or text pairs and their labels into the Trainer's rows, one dictionary a text, not padded."""
    if not len(inputs):
        return []
    pairs = isinstance(inputs[0], tuple)
    columns = tokenizer(
        [text[0] for text in inputs] if pairs else list(inputs),
        [text[1] for text in inputs] if pairs else None,
        truncation=True,
        max_length=max_length,
    )
    names = list(columns)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*(columns[name] for name in names), strict=True)]
    return [{**row, "labels": label} for row, label in zip(rows, labels.tolist(), strict=True)]


def train(
    model: GeepForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    settings: TrainSettings,
    checkpoint_dir: str | Path,
    device: str | None = None,
    report: Callable[[str, float], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train `model` in place by the stages of a recipe.

    Invariant: interrupted after any checkpoint (one an epoch), the same call goes on from there. The checkpoints are
    deleted when all stages are done.

    Args:
        model: Model with exits (or without, for a recipe that has none).
        tokenizer: Pads the batches.
        rows: Training rows of `encode`.
        settings: See `TrainSettings`.
        checkpoint_dir: Where checkpoints live while training runs.
        device: "cpu" keeps training off a GPU; None: what the Trainer finds.
        report: Told the stage and the share of it that is done; None: the Trainer shows its own bar and log.
        callbacks: Passed to the Trainer.

    Raises:
        ValueError: If the checkpoints there are of another training, or there are no rows, or the model has no exits
            and the recipe trains some.
    """
    recipe = RECIPES[settings.recipe]
    if not rows:
        raise ValueError("No training rows; expected at least one text with a label.")
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} was asked for, but torch finds no CUDA device; use device='cpu'.")
    if recipe.has_exits and not len(model.exits):
        raise ValueError(
            f"Recipe {settings.recipe!r} trains exits, but this encoder of {model.config.num_hidden_layers} layers "
            "has none; use recipe 'vanilla' or give exit_layers."
        )
    folder = Path(checkpoint_dir)
    base_rate = recipe.learning_rate if settings.learning_rate is None else settings.learning_rate
    ledger = _Ledger.of(model, rows, settings)
    ledger.open(folder)
    collate = DataCollatorWithPadding(tokenizer)
    if settings.standardise and not any(
        _last_checkpoint(folder / f"{n}-{stage.name}") for n, stage in enumerate(recipe.stages)
    ):
        standardise_heads(model, collate, rows)
    steps, seconds, logs = 0, 0.0, []
    for number, stage in enumerate(recipe.stages):
        later = [folder / f"{n}-{s.name}" for n, s in enumerate(recipe.stages) if n > number]
        if any(_last_checkpoint(path) for path in later):
            logger.info("Stage %s is done: a later stage has a checkpoint.", stage.name)
            continue
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(stage.trains == "all" or name.startswith("exits."))
        stage_folder = folder / f"{number}-{stage.name}"
        trainer = _StageTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(stage_folder),
                num_train_epochs=settings.epochs * stage.epochs_scale,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=base_rate * stage.learning_rate_scale,
                warmup_steps=settings.warmup,
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.max_grad_norm,
                train_sampling_strategy="group_by_length",
                bf16=settings.bf16,
                use_cpu=device == "cpu" or not torch.accelerator.is_available(),
                seed=settings.seed,
                save_strategy="epoch",
                save_total_limit=1,
                logging_steps=20,
                disable_tqdm=report is not None,
                report_to="none",
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=list(callbacks),
            optimizers=(_optimizer(model, stage, settings, base_rate), None),
            stage=stage,
            problem_type=model.config.problem_type,
        )
        if report is not None:
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_Reporter(report, f"training, {stage.name}"))
        result = trainer.train(resume_from_checkpoint=_last_checkpoint(stage_folder))
        steps += result.global_step
        seconds += float(result.metrics.get("train_runtime", 0.0))
        logs += [{"stage": stage.name, **entry} for entry in trainer.state.log_history]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train(mode=False)
    for number, stage in enumerate(recipe.stages):
        shutil.rmtree(folder / f"{number}-{stage.name}", ignore_errors=True)
    ledger.close(folder)
    with contextlib.suppress(OSError):  # there may be other things in it
        folder.rmdir()
    return TrainResult(steps=steps, seconds=seconds, logs=tuple(logs))


def _last_checkpoint(folder: Path) -> str | None:
    """Latest whole checkpoint; later ones that a killed process left half written are deleted."""
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))) is not None:
        with contextlib.suppress(OSError, ValueError):
            json.loads((Path(found) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the Trainer writes it last
            return found
        logger.warning("Checkpoint %s is not whole and is deleted; training goes on from the one before it.", found)
        shutil.rmtree(found)
    return None


def _optimizer(
    model: GeepForSequenceClassification, stage: Stage, settings: TrainSettings, base_rate: float
) -> torch.optim.Optimizer:
    """AdamW with a faster rate for the fresh heads (in the joint stages) and no decay on biases and norms."""
    rate = base_rate * stage.learning_rate_scale
    head_rate = rate * (settings.head_learning_rate_scale if stage.trains == "all" else 1.0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            key = (rate if name.startswith("encoder.") else head_rate, decay)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()],
        fused=True,  # on CPU ten times faster than the default loop over tensors: 41 against 427 ms for 40 M parameters
    )
