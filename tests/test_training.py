"""Losses equal slow versions, every recipe learns a toy task, frozen parts stay frozen, interrupted runs go on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NUM_LAYERS, make_model, random_batch, tiny_encoder, toy_task
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, TrainerCallback

from geep.modeling import HEADS, ExitOutput, GeepForSequenceClassification, first_linear
from geep.training import (
    RECIPES,
    Stage,
    TrainSettings,
    distillation,
    distillation_loss,
    encode,
    exit_label_loss,
    full_model_loss,
    guided_shared_exit_loss,
    shared_exit_loss,
    standardise_heads,
    train,
    weighted_joint_loss,
)

MULTI_LABEL = "multi_label_classification"


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
    for loss in (shared_exit_loss, distillation_loss, exit_label_loss, weighted_joint_loss):
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
    rows: list[dict[str, Any]],
    folder: Path,
    **options: Any,
) -> Any:
    options = {"settings": settings(), "report": lambda *_: None} | options
    return train(model, tokenizer, rows, checkpoint_dir=folder / "checkpoints", device="cpu", **options)


def toy_rows(tokenizer: PreTrainedTokenizerFast, count: int = 256, seed: int = 0) -> list[dict[str, Any]]:
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
    shares: list[tuple[str, float]] = []
    result = run(
        model,
        tokenizer,
        toy_rows(tokenizer),
        tmp_path,
        settings=settings(recipe),
        report=lambda what, share: shares.append((what, share)),
    )
    after, accuracies = evaluate(model, tokenizer, row.stages[0])
    assert after < 0.8 * before
    assert accuracies[-1] > 0.7
    if row.has_exits:
        assert min(accuracies) > 0.6  # chance is a third
    steps = [int(np.ceil(4 * stage.epochs_scale * 16)) for stage in row.stages]
    assert result.steps == sum(steps)
    assert result.seconds > 0
    assert {log["stage"] for log in result.logs} == {stage.name for stage in row.stages}
    assert all(np.isfinite(log["loss"]) for log in result.logs if "loss" in log)
    assert [what for what, share in shares if share == 1.0] == [f"training, {stage.name}" for stage in row.stages]
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


@pytest.mark.parametrize("recipe", [name for name, row in RECIPES.items() if len(row.stages) > 1])
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


@pytest.mark.parametrize(("recipe", "after"), [("geep", 1), ("fastbert", 3), ("fastbert", 4)])
def test_an_interrupted_training_goes_on_and_ends_the_same(
    recipe: str, after: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows, chosen = toy_rows(tokenizer, 96), settings(recipe, epochs=3)  # 6 steps an epoch; fastbert: 3, then 5 epochs
    expected, counter = fresh(), Interrupt(after=-1)
    run(expected, tokenizer, rows, tmp_path / "whole", settings=chosen, callbacks=[counter])
    total = sum(round(3 * stage.epochs_scale) for stage in RECIPES[recipe].stages) * 6
    assert counter.steps == total

    with pytest.raises(Interruption):
        run(fresh(), tokenizer, rows, tmp_path, settings=chosen, callbacks=[Interrupt(after)])
    model, rest = fresh(), Interrupt(after=-1)
    run(model, tokenizer, rows, tmp_path, settings=chosen, callbacks=[rest])
    assert rest.steps == total - 6 * after
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, dict(expected.named_parameters())[name], atol=1e-5), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "checkpoints").exists()


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
    assert encode(tokenizer, [], np.array([]), max_length=10) == []


def test_rows_are_not_changed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = toy_rows(tokenizer, 32)
    before: list[Mapping[str, Any]] = copy.deepcopy(rows)
    run(fresh(), tokenizer, rows, tmp_path, settings=settings(epochs=1))
    assert rows == before


def test_what_else_lies_in_the_folder_of_checkpoints_is_left_alone(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "thesis.txt").write_text("years of work")
    run(fresh(), tokenizer, toy_rows(tokenizer, 16), tmp_path, settings=settings("fastbert", epochs=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("recipe", [name for name, row in RECIPES.items() if row.has_exits])
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
