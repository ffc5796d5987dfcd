"""Losses equal slow versions, every recipe learns a toy task, frozen parts stay frozen, interrupted runs go on."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import NUM_LAYERS, make_model, make_tokenizer, random_batch, tiny_encoder, toy_task
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from geep.data import DataPlan, MappedTexts, Split
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.folder import Provenance
from geep.modeling import HEADS, ExitOutput, GeepForSequenceClassification, first_linear
from geep.training import (
    RECIPES,
    EncodedRows,
    Stage,
    TrainResult,
    TrainSettings,
    distillation,
    distillation_loss,
    encode,
    exit_label_loss,
    fine_tune,
    fine_tuning,
    full_model_loss,
    guided_shared_exit_loss,
    joint_loss,
    mean_joint_loss,
    run_recipe,
    shared_exit_loss,
    standardise_heads,
    weighted_joint_loss,
)
from geep.training.arguments import TAKEN
from geep.training.metrics import judge
from geep.training.rows import digest_rows

MULTI_LABEL = "multi_label_classification"
Rows = Sequence[Mapping[str, Any]]


def output_of(num_exits: int = 3, *, seed: int = 0, shared: bool = True) -> ExitOutput:
    random = torch.Generator().manual_seed(seed)
    exits, teachers = torch.randn(2, num_exits + 1, 5, 3, generator=random) * 2
    if shared:
        teachers[-1] = exits[-1]
    return ExitOutput(logits=exits[-1], exit_logits=exits, shared_exit_logits=teachers)


def slow_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return float(np.mean([-float(row.log_softmax(0)[int(label)]) for row, label in zip(logits, labels, strict=True)]))


def slow_kl(teacher: Tensor, student: Tensor) -> float:
    total = 0.0
    for target, answer in zip(teacher.double(), student.double(), strict=True):
        p, q = target.softmax(0), answer.softmax(0)
        total += sum(float(p[i] * (p[i] / q[i]).log()) for i in range(len(p)))
    return total / len(teacher)


LABELS = torch.tensor([0, 2, 1, 1, 0])


# Losses


def test_shared_exit_loss_equals_a_slow_version() -> None:
    output = output_of()
    exits, shared = output.exit_logits, output.shared_exit_logits
    assert exits is not None
    assert shared is not None
    hard = [slow_cross_entropy(logits, LABELS) for logits in shared]
    soft = [slow_kl(exits[-1], logits) for logits in exits[:-1]]
    expected = float(np.mean(hard) + np.mean(soft))
    assert float(shared_exit_loss(output, LABELS, None)) == pytest.approx(expected, rel=1e-5)
    labelled = [slow_cross_entropy(logits, LABELS) for logits in exits[:-1]]
    expected = hard[-1] + float(np.mean(hard[:-1]) + np.mean(soft) + np.mean(labelled))
    assert float(guided_shared_exit_loss(output, LABELS, None)) == pytest.approx(expected, rel=1e-5)


def test_the_baselines_losses_equal_slow_versions() -> None:
    output = output_of()
    exits = output.exit_logits
    assert exits is not None
    hard = [slow_cross_entropy(logits, LABELS) for logits in exits]
    soft = [slow_kl(exits[-1], logits) for logits in exits[:-1]]
    assert float(full_model_loss(output, LABELS, None)) == pytest.approx(hard[-1], rel=1e-5)
    assert float(distillation_loss(output, LABELS, None)) == pytest.approx(sum(soft), rel=1e-5)
    assert float(exit_label_loss(output, LABELS, None)) == pytest.approx(sum(hard[:-1]), rel=1e-5)
    assert float(joint_loss(output, LABELS, None)) == pytest.approx(sum(hard), rel=1e-5)
    assert float(mean_joint_loss(output, LABELS, None)) == pytest.approx(np.mean(hard), rel=1e-5)
    weighted = sum(weight * loss for weight, loss in enumerate(hard, 1)) / sum(range(1, 5))
    assert float(weighted_joint_loss(output, LABELS, None)) == pytest.approx(weighted, rel=1e-5)


def test_distillation_gives_the_teacher_no_gradient() -> None:
    for problem_type in (None, MULTI_LABEL):
        teacher, student = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
        distillation(teacher, student, problem_type).backward()
        assert teacher.grad is None
        assert student.grad is not None
        assert float(student.grad.abs().sum()) > 0


def test_distillation_is_0_for_equals_and_positive_otherwise() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for problem_type in (None, MULTI_LABEL):
        assert float(distillation(logits, logits, problem_type)) == pytest.approx(0, abs=1e-6)
        assert float(distillation(logits, logits.flip(0), problem_type)) > 0.1


def test_distillation_of_several_labels_adds_two_way_divergences() -> None:
    teacher, student = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    expected = sum(
        slow_kl(
            torch.stack([teacher[:, i], torch.zeros(4)], dim=1), torch.stack([student[:, i], torch.zeros(4)], dim=1)
        )
        for i in range(3)
    )
    assert float(distillation(teacher, student, MULTI_LABEL)) == pytest.approx(expected, rel=1e-4)


def test_the_shared_exit_loss_teaches_exits_by_the_full_model_alone() -> None:
    model = make_model()
    batch = random_batch(4, shortest=6, longest=6)
    ids, labels = torch.from_numpy(batch.input_ids).view(4, 6), torch.tensor([0, 1, 2, 0])
    output = model(ids, output_exits=True, output_shared_exits=True)
    shared_exit_loss(output, labels, None).backward()
    on_exits = {name: p.grad.clone() for name, p in model.exits.named_parameters() if p.grad is not None}
    model.zero_grad()
    output = model(ids, output_exits=True)
    distillation_loss(output, labels, None).backward()
    for name, parameter in model.exits.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(on_exits[name], parameter.grad / 3, atol=1e-5)
    # The divergence reaches the encoder, too, but not the teacher.
    assert all(p.grad is None or not p.grad.any() for p in model.teacher.parameters())
    assert float(model.encoder.get_input_embeddings().weight.grad.abs().sum()) > 0


def test_a_loss_without_the_logits_it_reads_is_refused() -> None:
    output = ExitOutput(logits=torch.zeros(5, 3))
    for loss in (shared_exit_loss, distillation_loss, exit_label_loss, joint_loss, weighted_joint_loss):
        with pytest.raises(ValueError, match="`needs`"):
            loss(output, LABELS, None)


@pytest.mark.parametrize("exit_layers", [(1, 2, 3), (2,), ()])
def test_a_step_of_the_shared_exit_loss_is_one_pass_and_one_layer_an_exit(exit_layers: tuple[int, ...]) -> None:
    model = make_model(exit_layers=exit_layers)
    calls: list[int] = []
    for number, layer in enumerate(model.encoder.encoder.layer):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    ids = torch.from_numpy(random_batch(1).input_ids)[None]
    model(ids, output_exits=True, output_shared_exits=True)
    assert len(calls) == NUM_LAYERS + len(exit_layers)
    assert sorted(calls) == sorted([*range(NUM_LAYERS), *[NUM_LAYERS - 1] * len(exit_layers)])
    calls.clear()
    model(ids, output_exits=True)
    assert calls == list(range(NUM_LAYERS))
    if exit_layers:
        calls.clear()
        model(ids, exit_layer=exit_layers[0])
        assert calls == list(range(exit_layers[0]))


# Training


def fresh(
    *, num_labels: int = 3, exit_layers: tuple[int, ...] = (1, 2), **options: Any
) -> GeepForSequenceClassification:
    """A model as small as the tests' others, with weights as a fresh model has them, so that it can learn."""
    torch.manual_seed(0)
    encoder = tiny_encoder("bert")
    encoder.apply(encoder._init_weights)
    return GeepForSequenceClassification.from_encoder(
        encoder, num_labels=num_labels, exit_layers=exit_layers, **options
    )


def settings(recipe: str = "geep", **changes: Any) -> TrainSettings:
    return TrainSettings(
        **({"recipe": recipe, "epochs": 4, "batch_size": 16, "learning_rate": 4e-3, "warmup": 0.1} | changes)
    )


def run(
    model: GeepForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    rows: Rows,
    folder: Path,
    **options: Any,
) -> Any:
    options = {"settings": settings()} | options
    return run_recipe(model, tokenizer, rows, checkpoint_dir=folder / "checkpoints", device="cpu", **options)


def toy_rows(tokenizer: PreTrainedTokenizerFast, count: int = 256, seed: int = 0) -> EncodedRows:
    return encode(tokenizer, *toy_task(count, seed=seed), max_length=32)


@torch.no_grad()
def evaluate(
    model: GeepForSequenceClassification, tokenizer: PreTrainedTokenizerFast, stage: Stage
) -> tuple[float, list[float]]:
    """Loss of a stage and accuracy of every exit on texts that were not trained on."""
    texts, labels = toy_task(200, seed=9)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    output = model.eval()(**inputs, output_exits=True, output_shared_exits=True)
    truth = torch.from_numpy(labels)
    loss = float(stage.loss(output, truth, model.config.problem_type))
    return loss, (output.exit_logits.argmax(-1) == truth).float().mean(1).tolist()


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_learns(recipe: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, row = fresh(), RECIPES[recipe]
    before, _ = evaluate(model, tokenizer, row.stages[0])
    said: list[tuple[str, int, int | None]] = []
    result = run(
        model,
        tokenizer,
        toy_rows(tokenizer),
        tmp_path,
        settings=settings(recipe),
        progress=lambda *words: said.append(words),
    )
    after, accuracies = evaluate(model, tokenizer, row.stages[0])
    assert after < 0.8 * before
    assert accuracies[-1] > 0.7
    if row.trains_exits:
        assert min(accuracies) > 0.6  # chance is a third
    steps = [int(np.ceil(4 * stage.epochs_scale * 16)) for stage in row.stages]
    assert result.steps == sum(steps)
    assert result.seconds > 0
    assert {log["stage"] for log in result.logs} == {stage.name for stage in row.stages}
    assert all(np.isfinite(log["loss"]) for log in result.logs if "loss" in log)
    assert [what for what, done, total in said if done == total] == [f"training, {stage.name}" for stage in row.stages]
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "checkpoints").exists()


class Snapshots(TrainerCallback):
    """Copies the model's weights when a stage begins."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.trained: list[set[str]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.trained.append({name for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("recipe", [name for name, row in RECIPES.items() if row.stages[-1].trains == "exits"])
def test_the_second_step_leaves_encoder_and_teacher_bit_for_bit(
    recipe: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, watch = fresh(), Snapshots()
    run(model, tokenizer, toy_rows(tokenizer, 96), tmp_path, settings=settings(recipe, epochs=1), callbacks=[watch])
    assert len(watch.weights) == 2
    start, between = watch.weights
    assert watch.trained[0] == set(start)
    assert watch.trained[1] == {name for name in start if name.startswith("exits.")}
    for name, parameter in model.named_parameters():
        is_exit = name.startswith("exits.")
        assert torch.equal(parameter, between[name]) != is_exit, name
        if is_exit:
            assert torch.equal(between[name], start[name]), name  # the first step does not touch them
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_teacher_has_no_dropout(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = fresh()
    modes: set[tuple[bool, bool, bool]] = set()
    model.teacher.register_forward_hook(
        lambda *_: modes.add((model.encoder.training, model.teacher.training, model.exits[0].training))
    )
    run(
        model,
        tokenizer,
        toy_rows(tokenizer, 32),
        tmp_path,
        settings=replace(settings("fastbert", epochs=1), standardise=False),
    )
    assert modes == {(True, True, True), (False, False, True)}


class Interruption(Exception):
    """Stands for a killed process."""


class Interrupt(TrainerCallback):
    """Stops a run right after some checkpoint."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interruption


@pytest.mark.parametrize(
    ("recipe", "after"),
    [
        ("geep", 1),
        ("fastbert", 3),
        ("fastbert", 4),
        ("berxit", 1),
        ("gradient-equilibrium", 1),
        ("mixed", 2),
        ("mixed", 4),
    ],
)
def test_an_interrupted_training_goes_on_and_ends_the_same(
    recipe: str, after: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # fastbert: 3, then 5 epochs. An odd number of steps each: losses that alternate do not begin anew with an epoch.
    rows, chosen, steps = toy_rows(tokenizer, 80), settings(recipe, epochs=3), 5
    expected, counter = fresh(), Interrupt(after=-1)
    run(expected, tokenizer, rows, tmp_path / "whole", settings=chosen, callbacks=[counter])
    total = sum(round(3 * stage.epochs_scale) for stage in RECIPES[recipe].stages) * steps
    assert counter.steps == total

    with pytest.raises(Interruption):
        run(fresh(), tokenizer, rows, tmp_path, settings=chosen, callbacks=[Interrupt(after)])
    model, rest = fresh(), Interrupt(after=-1)
    run(model, tokenizer, rows, tmp_path, settings=chosen, callbacks=[rest])
    assert rest.steps == total - steps * after
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, dict(expected.named_parameters())[name], atol=1e-5), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "checkpoints").exists()


Gradients = dict[str, Tensor]


def weighed(depths: Sequence[int], losses: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]) -> Gradients:
    """Gradient equilibrium by its formula: for an encoder layer the mean of the gradients of classifiers behind it."""
    found = {}
    for name, total in summed(depths, losses, parameters).items():
        layer = int(name.split(".")[3]) + 1 if name.startswith("encoder.encoder.layer.") else 0
        behind = sum(depth >= layer for depth in depths) if name.startswith("encoder.") else 1
        found[name] = total / behind  # to those before it a layer gives nothing
    return found


def summed(depths: Sequence[int], losses: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]) -> Gradients:
    found = torch.autograd.grad(torch.stack(list(losses)).sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def averaged(depths: Sequence[int], losses: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]) -> Gradients:
    return {name: row / len(losses) for name, row in summed(depths, losses, parameters).items()}


def of_the_full_model(
    depths: Sequence[int], losses: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]
) -> Gradients:
    """Exits have none, so that the optimizer leaves them where they are."""
    found = summed(depths[-1:], losses[-1:], parameters)
    return {name: row for name, row in found.items() if not name.startswith("exits.")}


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("problem_type", [None, MULTI_LABEL])
@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("berxit", [[of_the_full_model, summed, of_the_full_model]]),
        ("gradient-equilibrium", [[weighed] * 3]),
        ("mixed", [[of_the_full_model] * 3, [averaged] * 3]),
    ],
)
def test_steps_of_a_recipe_are_those_made_by_hand(
    recipe: str,
    stages: list[list[Any]],
    problem_type: str | None,
    batches: int,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    texts, ids = toy_task(32)
    truth = ids if problem_type is None else np.eye(3, dtype=np.float32)[ids]
    options = {} if problem_type is None else {"problem_type": problem_type}
    models = [fresh(**options), fresh(**options)]
    for model in models:
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    # All rows in each step, at a constant rate; a coarse epsilon, beside which a gradient of rounding alone is nothing.
    chosen = settings(
        recipe,
        epochs=3,
        batch_size=32 // batches,
        gradient_accumulation=batches,
        warmup=0.0,
        weight_decay=0.0,
        head_learning_rate_scale=1.0,
        standardise=False,
        arguments={"lr_scheduler_type": "constant", "adam_epsilon": 1e-3},
    )
    found, expected = models
    rows = encode(tokenizer, texts, truth, max_length=32)
    assert run(found, tokenizer, rows, tmp_path, settings=chosen).steps == sum(map(len, stages))
    inputs, labels = tokenizer(texts, padding=True, return_tensors="pt"), torch.from_numpy(truth)
    loss = F.cross_entropy if problem_type is None else F.binary_cross_entropy_with_logits
    parameters = dict(expected.train().named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for steps in stages:
        optimizer = torch.optim.AdamW(parameters.values(), lr=4e-3, eps=1e-3, weight_decay=0.0)
        for gradients in steps:
            logits = expected(**inputs, output_exits=True).exit_logits
            optimizer.zero_grad()
            losses = [loss(row, labels) for row in logits]
            for name, gradient in gradients(expected.config.depths, losses, parameters).items():
                parameters[name].grad = gradient
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
    for name, parameter in found.named_parameters():
        assert torch.allclose(parameter, parameters[name], atol=1e-5), name
    moved = [float((parameter.detach() - before[name]).abs().max()) for name, parameter in parameters.items()]
    assert sorted(moved)[len(moved) // 4] > 1e-4  # far more than what is overlooked


def test_checkpoints_of_another_training_are_not_continued(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows, chosen = toy_rows(tokenizer, 96), settings(epochs=3)
    with pytest.raises(Interruption):
        run(fresh(), tokenizer, rows, tmp_path, settings=chosen, callbacks=[Interrupt(1)])
    with pytest.raises(ValueError, match="other settings"):
        run(fresh(), tokenizer, rows, tmp_path, settings=replace(chosen, learning_rate=1e-9))
    with pytest.raises(ValueError, match="other rows"):
        run(fresh(), tokenizer, rows[:50], tmp_path, settings=chosen)


def test_heads_begin_with_standardised_features_whatever_the_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = toy_rows(tokenizer, 64)
    for head in HEADS:
        model = make_model(head=head)
        standardise_heads(model, DataCollatorWithPadding(tokenizer), rows)
        features: list[Tensor] = []
        first = first_linear(model.teacher)
        first.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(0, -2)))  # noqa: B023
        fresh_head = make_model(head=head)
        with torch.no_grad():
            for row in rows:
                model(torch.tensor([row["input_ids"]]))
        seen = torch.cat(features)
        spread = seen.std(0, correction=0)
        scale = first_linear(fresh_head.teacher).weight / first.weight
        wide = spread > 0.1 * spread.mean()
        assert torch.allclose(scale.mean(0)[wide], spread[wide], rtol=1e-3)
        # What the mean maps to is what the bias was: the features are centred.
        middle = F.linear(seen.mean(0), first.weight, first.bias)
        assert torch.allclose(middle, first_linear(fresh_head.teacher).bias, atol=1e-3)


def test_training_twice_gives_the_same_weights(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = toy_rows(tokenizer, 64)
    models = [fresh(), fresh()]
    for model in models:
        run(model, tokenizer, rows, tmp_path, settings=settings(epochs=1))
    one, two = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_models_of_several_labels_learn(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts, labels = toy_task(256)
    many = np.stack([labels == 0, labels != 2], axis=1).astype(np.float32)
    model = fresh(num_labels=2, problem_type=MULTI_LABEL)
    run(model, tokenizer, encode(tokenizer, texts, many, max_length=32), tmp_path)
    fresh_texts, fresh_labels = toy_task(200, seed=9)
    with torch.no_grad():
        logits = model(**tokenizer(fresh_texts, padding=True, return_tensors="pt"), output_exits=True).exit_logits
    truth = torch.from_numpy(np.stack([fresh_labels == 0, fresh_labels != 2], axis=1))
    assert float(((logits > 0) == truth).float().mean(dim=(1, 2)).min()) > 0.75


def test_pairs_keep_their_segments(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pairs = [("w1 w2", "w3"), ("w4", "w5 w6 w7")]
    rows = encode(tokenizer, pairs, np.array([1, 0]), max_length=32)
    assert [row["labels"] for row in rows] == [1, 0]
    assert rows[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert rows[0]["input_ids"] == tokenizer("w1 w2", "w3")["input_ids"]
    result = run(fresh(), tokenizer, rows, tmp_path, settings=settings(epochs=1))
    assert result.steps == 1


def test_texts_are_cut_at_the_longest_length(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = encode(tokenizer, ["w1 " * 50], np.array([0]), max_length=10)
    assert len(row["input_ids"]) == 10
    assert len(encode(tokenizer, [], np.array([]), max_length=10)) == 0
    with pytest.raises(ValueError, match="2 texts and 1 labels"):
        encode(tokenizer, ["w1", "w2"], np.array([0]), max_length=10)


def test_rows_are_not_changed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = toy_rows(tokenizer, 32)
    in_memory, before = list(rows), copy.deepcopy(list(rows))
    run(fresh(), tokenizer, in_memory, tmp_path, settings=settings(epochs=1))
    assert in_memory == before


def test_what_else_lies_in_the_folder_of_checkpoints_is_left_alone(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "thesis.txt").write_text("years of work")
    run(fresh(), tokenizer, toy_rows(tokenizer, 16), tmp_path, settings=settings("fastbert", epochs=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("recipe", [name for name, row in RECIPES.items() if row.trains_exits])
def test_a_recipe_with_exits_needs_exits(recipe: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"'{recipe}' trains exits.*4 layers has none.*'vanilla'"):
        run(fresh(exit_layers=()), tokenizer, toy_rows(tokenizer, 8), tmp_path, settings=settings(recipe))


def test_plain_fine_tuning_needs_no_exits(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chosen = settings("vanilla", epochs=1)
    assert run(fresh(exit_layers=()), tokenizer, toy_rows(tokenizer, 32), tmp_path, settings=chosen).steps == 2


def test_nothing_to_train_on_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No training rows"):
        run(fresh(), tokenizer, [], tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "magic"}, "Unknown recipe 'magic'.*geep"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"batch_size": -1}, "batch_size must be positive"),
        ({"max_length": 0}, "max_length must be positive"),
        ({"head_learning_rate_scale": 0}, "head_learning_rate_scale must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**changes)


def test_cross_entropy_is_torchs() -> None:
    logits = torch.randn(5, 3)
    assert slow_cross_entropy(logits, LABELS) == pytest.approx(float(F.cross_entropy(logits, LABELS)), rel=1e-5)


def test_a_checkpoint_that_was_cut_off_while_written_is_passed_over(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows, chosen = toy_rows(tokenizer, 96), settings(epochs=3)
    with pytest.raises(Interruption):
        run(fresh(), tokenizer, rows, tmp_path, settings=chosen, callbacks=[Interrupt(1)])
    (whole,) = (tmp_path / "checkpoints" / "0-shared-exit").iterdir()
    torn = whole.with_name("checkpoint-12")
    torn.mkdir()
    (torn / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:1000])
    rest = Interrupt(after=-1)
    assert run(fresh(), tokenizer, rows, tmp_path, settings=chosen, callbacks=[rest]).steps == 18
    assert rest.steps == 12


# Rows


def test_rows_on_disk_are_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts, labels = toy_task(50)
    several = np.stack([labels == 0, labels != 2], axis=1).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geep.training.rows._CHUNK_ROWS", 7)
        for truth in (labels, several):
            rows = encode(tokenizer, texts, truth, max_length=6)
            columns = tokenizer(texts, truncation=True, max_length=6)
            expected = [
                {"input_ids": ids, "token_type_ids": types, "labels": label}
                for ids, types, label in zip(
                    columns["input_ids"], columns["token_type_ids"], truth.tolist(), strict=True
                )
            ]
            assert len(rows) == 50
            assert list(rows) == expected
            assert rows[3:30:4] == expected[3:30:4]
            assert rows[-1] == expected[-1]
            with pytest.raises(IndexError, match="There are 50 rows, asked for number 50"):
                rows[50]
            assert rows.lengths.tolist() == [len(row["input_ids"]) for row in expected]
            assert digest_rows(rows) == digest_rows(expected)
            assert digest_rows(expected[1:]) != digest_rows(expected) != digest_rows(expected[::-1])


def test_tokenising_says_how_far_it_is(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geep.training.rows._CHUNK_ROWS", 4)
    said: list[tuple[str, int, int | None]] = []
    encode(tokenizer, *toy_task(10), max_length=8, progress=lambda *words: said.append(words))
    assert said == [("tokenising", 4, 10), ("tokenising", 8, 10), ("tokenising", 10, 10)]


def test_texts_on_disk_train_as_those_in_memory(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, labels = toy_task(96)
    mapped = MappedTexts([pa.array(texts[:40]), pa.array(texts[40:])])
    kinds: list[Rows] = [
        list(encode(tokenizer, texts, labels, max_length=32)),
        encode(tokenizer, mapped, labels, max_length=32),
    ]
    chosen = settings(epochs=1, arguments={"logging_steps": 1})
    one, other = (run(fresh(), tokenizer, rows, tmp_path, settings=chosen) for rows in kinds)
    losses = [[log["loss"] for log in result.logs if "loss" in log] for result in (one, other)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def test_every_row_is_read_once_an_epoch(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, dev = toy_rows(tokenizer, 64), toy_rows(tokenizer, 24, seed=1)
    read: list[int] = []
    plain = EncodedRows.__getitem__

    def counted(self: EncodedRows, item: Any) -> Any:
        if isinstance(item, int):
            read.append(item)
        return plain(self, item)

    monkeypatch.setattr(EncodedRows, "__getitem__", counted)
    run(fresh(), tokenizer, rows, tmp_path, settings=settings(epochs=2, standardise=False), dev=dev)
    assert len(read) == 2 * 64 + 2 * 24  # their lengths, for batches of texts alike, cost none


# Settings of the Trainer


def without_dropout(model: GeepForSequenceClassification) -> GeepForSequenceClassification:
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def test_two_batches_of_8_make_the_step_of_one_of_16(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # With a large epsilon AdamW's step is in proportion to the gradient, which is what is compared.
    arguments = {"max_steps": 1, "logging_steps": 1, "adam_epsilon": 1.0}
    rows, models, logs = toy_rows(tokenizer, 64), [], []
    start = without_dropout(fresh()).state_dict()
    for size, times in ((16, 1), (8, 2), (8, 1)):
        model = without_dropout(fresh())
        chosen = settings(
            batch_size=size,
            gradient_accumulation=times,
            learning_rate=1.0,
            warmup=0.0,
            standardise=False,
            max_grad_norm=100.0,
            arguments=arguments,
        )
        logs.append(run(model, tokenizer, rows, tmp_path, settings=chosen).logs[0])
        models.append(model.state_dict())
    whole, halves, half = logs
    assert halves["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert halves["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert half["loss"] != pytest.approx(whole["loss"], rel=1e-3)
    for name, weight in models[0].items():
        moved = float((weight - start[name]).abs().max())
        assert torch.allclose(models[1][name], weight, atol=1e-3 * moved + 1e-7), name
    assert not torch.allclose(models[2]["teacher.out.weight"], models[0]["teacher.out.weight"], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adam_beta3": 0.9}, "no field 'adam_beta3'; did you mean .*'adam_beta2'"),
        ({"colour": 1}, "no field 'colour'; see"),
        ({"num_train_epochs": 2}, "'num_train_epochs' of TrainingArguments is geep's to set; use TrainSettings.epochs"),
        ({"gradient_accumulation_steps": 2}, "use TrainSettings.gradient_accumulation"),
        ({"optim": "sgd"}, "AdamW"),
        ({"save_total_limit": 5}, "the best one are kept"),
        ({"logging_dir": object()}, "no field 'logging_dir'"),
        ({"run_name": object()}, "as JSON, so values are words"),
    ],
)
def test_arguments_that_geep_cannot_hand_through_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(arguments=arguments)


def test_what_geep_sets_is_a_field_of_the_trainer_and_refused(tmp_path: Path) -> None:
    known = {field.name for field in fields(TrainingArguments)} | {"warmup_ratio"}  # which older versions have
    assert TAKEN.keys() <= known
    for name in TAKEN:
        with pytest.raises(ValueError, match=f"'{name}' of TrainingArguments is geep's to set"):
            TrainSettings(arguments={name: 1})


def test_arguments_reach_the_trainer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    seen: list[TrainingArguments] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(args)
            seen.append(kwargs["optimizer"].param_groups[0])

    given = {"max_steps": 2, "adam_beta2": 0.95, "lr_scheduler_type": "cosine", "train_sampling_strategy": "random"}
    chosen = settings(arguments=given)
    assert chosen.arguments == given
    assert hash(chosen) == hash(replace(chosen))
    dev = toy_rows(tokenizer, 8)
    result = run(fresh(), tokenizer, toy_rows(tokenizer, 32), tmp_path, settings=chosen, callbacks=[Look()], dev=dev)
    assert result.steps == 2
    args, group = seen
    assert (args.lr_scheduler_type, args.train_sampling_strategy) == ("cosine", "random")
    assert group["betas"] == (0.9, 0.95)  # type: ignore[index]


# Development rows


def slow_f1(answers: list[set[int]], truth: list[set[int]], labels: set[int]) -> float:
    hit = sum(len(a & b & labels) for a, b in zip(answers, truth, strict=True))
    given, there = (sum(len(a & labels) for a in rows) for rows in (answers, truth))
    return 2 * hit / (given + there)


def test_measures_of_one_label_equal_slow_ones() -> None:
    random = np.random.default_rng(0)
    truth, answers = random.integers(0, 4, 60), random.integers(1, 5, 60)
    measures = judge(answers, truth)
    sets = [{int(a)} for a in answers], [{int(b)} for b in truth]
    assert measures["accuracy"] == pytest.approx(sum(a == b for a, b in zip(*sets, strict=True)) / 60)
    assert measures["macro_f1"] == pytest.approx(np.mean([slow_f1(*sets, {label}) for label in range(5)]))
    assert measures["majority"] == pytest.approx(max(np.bincount(truth)) / 60)
    assert measures["num_answers"] == 4
    assert "micro_f1" not in measures


def test_measures_of_several_labels_equal_slow_ones() -> None:
    random = np.random.default_rng(0)
    truth, answers = random.integers(0, 2, (2, 50, 3))
    answers[:30] = truth[:30]
    measures = judge(answers, truth)
    sets = tuple([set(np.flatnonzero(row).tolist()) for row in rows] for rows in (answers, truth))
    assert measures["accuracy"] == pytest.approx(sum(a == b for a, b in zip(*sets, strict=True)) / 50)
    assert measures["micro_f1"] == pytest.approx(slow_f1(*sets, {0, 1, 2}))
    assert measures["macro_f1"] == pytest.approx(np.mean([slow_f1(*sets, {label}) for label in range(3)]))
    constant = [slow_f1([{label}] * 50, sets[1], {0, 1, 2}) for label in range(3)]
    assert measures["majority"] == pytest.approx(max(constant))
    assert judge(np.zeros((2, 3)), np.zeros((2, 3)))["macro_f1"] == 0


def test_the_full_model_is_judged_beside_the_most_frequent_label(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    texts, labels = toy_task(150, seed=5)
    dev = encode(tokenizer, texts, labels, max_length=32)
    model = fresh()
    result = run(model, tokenizer, toy_rows(tokenizer), tmp_path, dev=dev)
    assert result.dev is not None
    with torch.no_grad():
        answers = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1).numpy()
    assert result.dev.accuracy == pytest.approx(float((answers == labels).mean()))  # of the weights that were kept
    assert result.dev.majority == pytest.approx(np.bincount(labels).max() / 150)
    assert result.dev.num_rows == 150
    assert result.dev.accuracy > result.dev.majority
    assert result.dev.micro_f1 is None
    assert result.dev.score == result.dev.accuracy
    assert result.learned_nothing is None
    judged = [log for log in result.logs if "eval_score" in log]
    assert len(judged) == 4
    assert max(log["eval_accuracy"] for log in judged) == result.dev.accuracy


def test_models_of_several_labels_are_judged_by_micro_f1(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts, labels = toy_task(256)
    many = np.stack([labels == 0, labels != 2], axis=1).astype(np.float32)
    rows = encode(tokenizer, texts, many, max_length=32)
    result = run(fresh(num_labels=2, problem_type=MULTI_LABEL), tokenizer, rows, tmp_path, dev=rows)
    assert result.dev is not None
    assert result.dev.micro_f1 == result.dev.score > 0.75
    assert result.dev.micro_f1 > result.dev.majority
    assert result.learned_nothing is None


def score_by_epoch(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> None:
    """Let the model's accuracy after each epoch be this, in turn."""
    turns = iter(scores)

    def pretended(answers: Any, truth: Any) -> dict[str, float]:
        return {**judge(answers, truth), "accuracy": next(turns)}

    monkeypatch.setattr("geep.training.trainer.judge", pretended)


class Epochs(TrainerCallback):
    """Copies the weights after each epoch in which they are judged."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in kwargs["model"].named_parameters()})


@pytest.mark.parametrize(("scores", "best"), [([0.5, 0.9, 0.2], 2), ([0.9, 0.5, 0.8], 1), ([0.4, 0.8, 0.8], 3)])
def test_the_best_epoch_is_kept_and_among_equals_the_last(
    scores: list[float],
    best: int,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score_by_epoch(monkeypatch, scores)
    model, watch = fresh(), Epochs()
    rows, dev = toy_rows(tokenizer, 64), toy_rows(tokenizer, 16, seed=1)
    result = run(model, tokenizer, rows, tmp_path, settings=settings(epochs=3), dev=dev, callbacks=[watch])
    assert len(watch.weights) == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, watch.weights[best - 1][name]), name
    assert result.dev is not None
    assert (result.dev.best_epoch, result.dev.accuracy) == (best, scores[best - 1])
    assert result.steps == 12


@pytest.mark.parametrize(("recipe", "after"), [("geep", 1), ("geep", 2), ("geep", 3), ("fastbert", 3), ("fastbert", 5)])
def test_an_interrupted_training_keeps_the_best_epoch_too(
    recipe: str, after: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, dev, chosen = toy_rows(tokenizer, 64), toy_rows(tokenizer, 16, seed=1), settings(recipe, epochs=3)
    expected = fresh()
    score_by_epoch(monkeypatch, [0.5, 0.9, 0.2])
    whole = run(expected, tokenizer, rows, tmp_path / "whole", settings=chosen, dev=dev)
    score_by_epoch(monkeypatch, [0.5, 0.9, 0.2])
    with pytest.raises(Interruption):
        run(fresh(), tokenizer, rows, tmp_path, settings=chosen, dev=dev, callbacks=[Interrupt(after)])
    model = fresh()
    result = run(model, tokenizer, rows, tmp_path, settings=chosen, dev=dev)
    assert (result.dev, result.steps) == (whole.dev, whole.steps)
    assert result.dev is not None
    assert result.dev.best_epoch == 2
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, dict(expected.named_parameters())[name], atol=1e-5), name
    assert not (tmp_path / "checkpoints").exists()


def test_exits_alone_do_not_choose_by_a_full_model_that_does_not_move(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows, dev = toy_rows(tokenizer, 64), toy_rows(tokenizer, 16, seed=1)
    result = run(fresh(), tokenizer, rows, tmp_path, settings=settings("fastbert", epochs=3), dev=dev)
    assert [log["stage"] for log in result.logs if "eval_score" in log] == ["fine-tune"] * 3


def test_other_development_rows_are_another_training(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows, dev, chosen = toy_rows(tokenizer, 32), toy_rows(tokenizer, 16, seed=1), settings(epochs=2)
    with pytest.raises(Interruption):
        run(fresh(), tokenizer, rows, tmp_path, settings=chosen, dev=dev, callbacks=[Interrupt(1)])
    with pytest.raises(ValueError, match="other development rows"):
        run(fresh(), tokenizer, rows, tmp_path, settings=chosen)


def test_a_model_that_learned_nothing_says_so(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = fresh()
    with torch.no_grad():
        model.teacher.out.bias[1] = 100.0
    rows = toy_rows(tokenizer, 32)
    result = run(model, tokenizer, rows, tmp_path, settings=settings(epochs=1, learning_rate=1e-9), dev=rows)
    assert "all 32 development rows the same answer" in str(result.learned_nothing)
    assert result.dev is not None
    poor = replace(result.dev, num_answers=3, accuracy=0.4, majority=0.4)
    assert "accuracy on 32 development rows is 0.400" in str(poor.learned_nothing)
    assert replace(poor, accuracy=0.41).learned_nothing is None
    assert "micro F1" in str(replace(poor, micro_f1=0.1).learned_nothing)
    assert TrainResult(1, 1.0, ()).learned_nothing is None


# train


@pytest.fixture
def encoder_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    torch.manual_seed(0)
    encoder = tiny_encoder("bert")
    encoder.apply(encoder._init_weights)
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


@pytest.fixture
def plan(tmp_path: Path) -> DataPlan:
    texts, labels = toy_task(200)
    rows = [{"text": text, "label": "abc"[label]} for text, label in zip(texts, labels, strict=True)]
    path = tmp_path / "toy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return DataPlan(str(path), holdout=0.3)


def trained(asked: DataPlan, folder: Path, encoder: str, **options: Any) -> TrainResult:
    options = {"settings": settings(epochs=3, max_length=32), "plan": asked, "device": "cpu"} | options
    return fine_tune(asked.parts(), folder, encoder=encoder, **options)


def test_train_writes_a_whole_folder(plan: DataPlan, encoder_folder: str, tmp_path: Path) -> None:
    said: set[str] = set()
    folder = tmp_path / "out" / "model"
    result = trained(
        plan, folder, encoder_folder, exit_layers=[1, 3], progress=lambda what, done, total: said.add(what)
    )
    assert result.dev is not None
    assert result.dev.num_rows == len(plan.parts().profile)
    assert result.learned_nothing is None
    assert said == {"tokenising", "training, shared-exit"}
    model = GeepForSequenceClassification.from_pretrained(folder)
    assert model.config.exit_layers == [1, 3]
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 32
    assert not (folder / "checkpoints").exists()
    record = Provenance.read(folder)
    assert DataPlan(**record.data) == plan
    assert record.about["exit_layers"] == "1,3"
    assert record.result == {"steps": result.steps, "seconds": result.seconds, "dev": asdict(result.dev)}


def test_a_finished_folder_is_not_trained_again(
    plan: DataPlan, encoder_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    first = trained(plan, folder, encoder_folder)
    monkeypatch.setattr("geep.training.fine_tuning.run_recipe", None)
    assert trained(plan, folder, encoder_folder) == replace(first, was_finished=True)
    for changes in (
        {"settings": settings(epochs=2, max_length=32)},
        {"head": "cls"},
        {"exit_layers": [1]},
        {"plan": replace(plan, seed=1)},
        {"plan": None},
    ):
        with pytest.raises(ValueError, match="trained with other settings or data"):
            trained(plan, folder, encoder_folder, **changes)


def test_a_part_of_many_rows_is_enough_to_judge_by(
    plan: DataPlan, encoder_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geep.training.fine_tuning._MOST_DEV_ROWS", 10)
    result = trained(plan, tmp_path / "model", encoder_folder, settings=settings(epochs=1))
    assert result.dev is not None
    assert result.dev.num_rows == 10


def test_a_folder_of_an_older_version_is_finished_too(plan: DataPlan, encoder_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    chosen = asdict(settings(epochs=3, max_length=32))
    for name in ("gradient_accumulation", "arguments"):
        del chosen[name]
    data = asdict(plan)
    del data["seed"]
    about = {
        "encoder": encoder_folder,
        "head": "mean",
        "exit_layers": "1, 2",
        "settings": chosen,
        "data": data,
        "rows": len(plan.parts().train),
    }
    Provenance(about, {"steps": 7, "seconds": 1.5}, [{"loss": 1.0}]).write(folder)
    assert trained(plan, folder, encoder_folder, exit_layers=[1, 2]) == TrainResult(
        7, 1.5, ({"loss": 1.0},), was_finished=True
    )
    assert Provenance.read(folder).data == data
    with pytest.raises(ValueError, match="other settings"):
        trained(plan, folder, encoder_folder, exit_layers=[1, 3])


@pytest.mark.parametrize("when", ["while the model is saved", "before the last file"])
def test_train_killed_after_the_last_step_runs_no_step_again(
    when: str, plan: DataPlan, encoder_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(plan, tmp_path / "whole", encoder_folder)
    folder = tmp_path / "model"
    save = GeepForSequenceClassification.save_pretrained

    def killed(self: Any, path: Any, *rest: Any, **options: Any) -> Any:
        if Path(path) == folder:
            raise Interruption
        return save(self, path, *rest, **options)

    def unwritten(self: Provenance, folder: Any) -> None:
        raise Interruption

    with monkeypatch.context() as patch:
        if when == "before the last file":
            patch.setattr(Provenance, "write", unwritten)
        else:
            patch.setattr(GeepForSequenceClassification, "save_pretrained", killed)
        with pytest.raises(Interruption):
            trained(plan, folder, encoder_folder)
    assert (folder / "checkpoints").exists()
    assert not (folder / "training.json").exists()
    said: list[str] = []
    result = trained(plan, folder, encoder_folder, progress=lambda what, done, total: said.append(what))
    assert set(said) == {"tokenising"}
    assert (result.steps, result.dev) == (expected.steps, expected.dev)
    one, two = (GeepForSequenceClassification.from_pretrained(path) for path in (tmp_path / "whole", folder))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name
    assert not (folder / "checkpoints").exists()


def test_train_without_a_plan_tells_rows_apart_by_their_texts(
    plan: DataPlan, encoder_folder: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"encoder": encoder_folder, "settings": settings(epochs=1), "device": "cpu"}
    parts = plan.parts()
    first = fine_tune(parts, tmp_path / "model", **options)
    assert fine_tune(parts, tmp_path / "model", **options) == replace(first, was_finished=True)
    with pytest.raises(ValueError, match="without plan="):
        Provenance.read(tmp_path / "model").data  # noqa: B018
    turned = replace(parts, train=parts.train.select(np.arange(len(parts.train))[::-1]))
    with pytest.raises(ValueError, match="other settings or data"):
        fine_tune(turned, tmp_path / "model", **options)


def test_train_of_rows_without_labels_is_refused(plan: DataPlan, encoder_folder: str, tmp_path: Path) -> None:
    parts = plan.parts()
    with pytest.raises(ValueError, match="training rows have no labels"):
        fine_tune(replace(parts, train=Split(parts.train.texts)), tmp_path / "model", encoder=encoder_folder)
    bare = replace(parts, profile=Split(parts.profile.texts))
    found = fine_tune(bare, tmp_path / "m", encoder=encoder_folder, settings=settings(epochs=1), device="cpu")
    assert found.dev is None


def test_a_folder_that_is_not_finished_has_no_provenance(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"training\.json is missing.*no folder finished by `geep train`"):
        Provenance.read(tmp_path)
    (tmp_path / "training.json").write_text('{"about": {}}', "utf-8")
    with pytest.raises(ValueError, match="no record of a training"):
        Provenance.read(tmp_path)


# Texts without any token


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("backend", ["packed", "padded"])
def test_batches_of_texts_without_any_token_are_learned_from_and_answered(
    head: str, backend: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    # Some tokenizers add no special tokens: an empty text then has none at all.
    bare = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = bare
    texts = ["", " ", "", "\t", "w1", "", "w2 w3", ""]
    rows = encode(tokenizer, texts, np.array([0, 1, 2, 0, 1, 2, 0, 1]), max_length=8)
    assert sorted(rows.lengths.tolist()) == [0, 0, 0, 0, 0, 0, 1, 2]
    model = make_model(head=head)
    options: dict[str, Any] = {"settings": settings(epochs=2, batch_size=2), "device": "cpu"}
    run_recipe(model, tokenizer, rows, checkpoint_dir=tmp_path, dev=rows, **options)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    config = EngineConfig(device="cpu", backend=backend)
    engine = Engine(model, tokenizer, config=config, settings=ExitSettings(speed=0.5, criterion="entropy"))
    empty, blank, *_ = engine.predict(texts)
    (alone,) = engine.predict([""])
    assert alone.scores == pytest.approx(empty.scores, abs=1e-6)
    assert blank.scores == pytest.approx(empty.scores, abs=1e-6)


# Several processes


class OtherProcess:
    """What a process that is not the first one is told by accelerate."""

    is_main_process = False
    waited: ClassVar[list[Path]] = []
    folder: ClassVar[Path]

    def wait_for_everyone(self) -> None:
        self.waited.extend(self.folder.iterdir())


def test_of_several_processes_the_first_one_writes(
    plan: DataPlan, encoder_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OtherProcess, "folder", tmp_path / "model", raising=False)
    monkeypatch.setattr(fine_tuning, "PartialState", OtherProcess)
    options: dict[str, Any] = {"encoder": encoder_folder, "settings": settings(epochs=1), "device": "cpu"}
    found = fine_tune(plan.parts(), tmp_path / "model", plan=plan, **options)
    assert found.steps > 0
    assert [path.name for path in OtherProcess.waited] == ["checkpoints"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["checkpoints"]
