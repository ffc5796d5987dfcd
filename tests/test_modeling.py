"""Every family: the layer loop is Hugging Face's own, exits answer where they should, models save and load."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NUM_LAYERS, PAD, make_model, random_batch, tiny_encoder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from geep.modeling import FAMILIES, HEADS, GeepConfig, GeepForSequenceClassification, Spans, layer_calls

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
every_head = pytest.mark.parametrize("head", sorted(HEADS))


def padded(*, seed: int = 0, rows: int = 5, extra: int = 0) -> dict[str, Tensor]:
    """Texts of different lengths with segment ids, padded on the right."""
    batch = random_batch(rows, seed=seed, pairs=True)
    mask = torch.arange(int(batch.lengths.max()) + extra) < torch.from_numpy(batch.lengths)[:, None]
    ids, types = torch.full(mask.shape, PAD), torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.from_numpy(batch.input_ids)
    types[mask] = torch.from_numpy(batch.token_type_ids)
    return {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": types}


def for_encoder(encoder: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    has_types = FAMILIES[encoder.config.model_type].has_token_type_ids
    return {name: value for name, value in inputs.items() if has_types or name != "token_type_ids"}


def layer_list(encoder: PreTrainedModel) -> nn.ModuleList:
    return encoder.get_submodule(FAMILIES[encoder.config.model_type].layers)


# Encoders, taken apart


@every_family
@torch.no_grad()
def test_hidden_states_are_those_of_hugging_face(family: str) -> None:
    model, inputs = make_model(family), padded()
    own = model(**inputs, output_hidden_states=True).hidden_states
    theirs = model.encoder(**for_encoder(model.encoder, inputs), output_hidden_states=True)
    assert len(own) == len(theirs.hidden_states) == NUM_LAYERS + 1
    for ours, expected in zip(own[:-1], theirs.hidden_states[:-1], strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(model.finish(own[-1]), theirs.last_hidden_state)
    changes = [float((deeper - layer).abs().mean()) for layer, deeper in zip(own, own[1:], strict=False)]
    assert min(changes) > 0.05  # layers that did nothing would make the test blind


@every_family
@torch.no_grad()
def test_layer_calls_leave_the_encoder_as_it_was(family: str) -> None:
    encoder, inputs = tiny_encoder(family), padded()
    before = dict(encoder.named_modules())
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    first, second = (layer_calls(encoder, for_encoder(encoder, inputs)) for _ in range(2))
    after = dict(encoder.named_modules())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())
    assert len(first.layers) == NUM_LAYERS
    assert all(call.module in set(before.values()) for call in first.layers)
    one, two = first.embedding_output, second.embedding_output
    for left, right in zip(first.layers, second.layers, strict=True):
        one, two = left(one), right(two)
    assert torch.equal(one, two)


@every_family
@torch.no_grad()
def test_a_layer_call_runs_a_prefix_of_the_rows(family: str) -> None:
    encoder, inputs = tiny_encoder(family), padded()
    calls = layer_calls(encoder, for_encoder(encoder, inputs))
    whole = calls.embedding_output
    for rows, call in zip((5, 3, 2, 1), calls.layers, strict=True):
        assert torch.allclose(call(whole[:rows]), call(whole)[:rows], atol=1e-5)
        whole = call(whole)


@torch.no_grad()
def test_albert_with_several_groups_runs_each_layer_with_its_own_group() -> None:
    model, inputs = make_model("albert", num_hidden_groups=2), padded()
    own = model(**inputs, output_hidden_states=True).hidden_states
    theirs = model.encoder(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(ours, expected) for ours, expected in zip(own, theirs, strict=True))


# Exits


@every_family
@every_head
@torch.no_grad()
def test_a_run_to_an_exit_gives_that_exits_logits(family: str, head: str) -> None:
    model, inputs = make_model(family, head=head, exit_layers=(1, 3)), padded()
    whole = model(**inputs, output_exits=True)
    assert whole.exit_logits.shape == (3, 5, 3)
    assert torch.equal(whole.logits, whole.exit_logits[-1])
    assert torch.equal(whole.logits, model(**inputs).logits)
    for place, layer in enumerate(model.config.depths):
        assert torch.equal(model(**inputs, exit_layer=layer).logits, whole.exit_logits[place])
    truncated = model(**inputs, exit_layer=3, output_exits=True, output_hidden_states=True)
    assert torch.equal(truncated.exit_logits, whole.exit_logits[:2])
    assert len(truncated.hidden_states) == 4


@every_family
@torch.no_grad()
def test_shared_exit_is_the_last_layer_and_the_teacher_behind_every_depth(family: str) -> None:
    model, inputs = make_model(family, exit_layers=(1, 3)), padded()
    shared = model(**inputs, output_shared_exits=True).shared_exit_logits
    assert shared.shape == (3, 5, 3)
    for place, layer in enumerate(model.config.depths):
        # The sub-network of the paper, built for real: layers 1 … k and the last one in Hugging Face's own encoder.
        short = copy.deepcopy(model.encoder)
        if layer < NUM_LAYERS:
            short.config.num_hidden_layers = layer + 1
            if family != "albert":  # its layers are one and the same
                layers = layer_list(short)
                kept = [*layers[:layer], layers[-1]]
                del layers[layer + 1 :]
                layers[layer] = kept[-1]
        hidden = short(**for_encoder(short, inputs)).last_hidden_state
        expected = model.teacher(hidden, inputs["attention_mask"])
        assert torch.allclose(shared[place], expected, atol=1e-5)


@every_family
@every_head
@torch.no_grad()
def test_padding_changes_no_logits(family: str, head: str) -> None:
    model = make_model(family, head=head).double()  # beside it float32 rounds heads of loud weights
    narrow, wide = padded(), padded(extra=9)
    wide["input_ids"][wide["attention_mask"] == 0] = 7  # what lies under the mask does not matter
    if FAMILIES[family].positions_after_pad:
        wide["input_ids"][wide["attention_mask"] == 0] = PAD  # these count positions by the pad id, not by the mask
    found = model(**wide, output_exits=True, output_shared_exits=True)
    expected = model(**narrow, output_exits=True, output_shared_exits=True)
    assert torch.allclose(found.exit_logits, expected.exit_logits, atol=1e-9, rtol=0)
    assert torch.allclose(found.shared_exit_logits, expected.shared_exit_logits, atol=1e-9, rtol=0)
    for row in range(5):
        length = int(narrow["attention_mask"][row].sum())
        single = {name: value[row : row + 1, :length] for name, value in narrow.items() if name != "attention_mask"}
        assert torch.allclose(
            model(**single, output_exits=True).exit_logits[:, 0], expected.exit_logits[:, row], atol=1e-9, rtol=0
        )


@every_head
@torch.no_grad()
def test_heads_read_packed_texts_like_padded_ones(head: str) -> None:
    model = make_model(head=head)
    mask = padded()["attention_mask"]
    hidden = torch.randn(*mask.shape, 32)
    packed = hidden[mask.bool()]
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    for dtype in (torch.int32, torch.int64):
        found = model.teacher.forward_packed(packed, Spans(offsets.to(dtype), len(packed), int(mask.sum(1).max())))
        assert torch.allclose(found, model.teacher(hidden, mask), atol=1e-5, rtol=1e-5)


@every_head
@torch.no_grad()
def test_a_head_that_reads_the_first_token_reads_no_other(head: str) -> None:
    teacher = make_model(head=head).teacher
    mask = padded()["attention_mask"]
    hidden = torch.randn(*mask.shape, 32)
    changed = torch.cat([hidden[:, :1], torch.randn_like(hidden[:, 1:])], dim=1)
    assert torch.equal(teacher(hidden, mask), teacher(changed, mask)) == teacher.reads_first_token_only


@pytest.mark.parametrize("layer", [0, 2, 5, -1])
def test_an_exit_that_is_not_there_is_refused(layer: int) -> None:
    model = make_model(exit_layers=(1, 3))
    with pytest.raises(ValueError, match=rf"No exit at layer {layer}.*\[1, 3, 4\]"):
        model(**padded(), exit_layer=layer)


def test_shared_exits_of_a_truncated_run_are_refused(tiny_model: GeepForSequenceClassification) -> None:
    with pytest.raises(ValueError, match="exit_layer=1"):
        tiny_model(**padded(), exit_layer=1, output_shared_exits=True)


@every_family
@every_head
def test_gradients_reach_encoder_and_teacher_through_the_shared_exits(family: str, head: str) -> None:
    model = make_model(family, head=head)
    model(**padded(), output_shared_exits=True).shared_exit_logits[0].sum().backward()
    first, last = layer_list(model.encoder)[0], layer_list(model.encoder)[-1]
    for part in (model.get_input_embeddings(), first, last, model.teacher):
        assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in part.parameters())
    assert all(p.grad is None for p in model.exits.parameters())
    if family != "albert":
        skipped = layer_list(model.encoder)[2]
        assert all(p.grad is None or not p.grad.any() for p in skipped.parameters())


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    inputs = padded()
    if not tiny_encoder(family).supports_gradient_checkpointing:
        pytest.skip("Hugging Face's encoder has no checkpointing")
    found = []
    for checkpointing in (False, True):
        model = make_model(family, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        model.train()
        if checkpointing:
            # Versions that have no activation_checkpointing_enable have the name that newer ones warn of.
            newer = getattr(model, "activation_checkpointing_enable", None)
            (model.gradient_checkpointing_enable if newer is None else newer)()
        output = model(**inputs, output_exits=True, output_shared_exits=True)
        (output.exit_logits.square().sum() + output.shared_exit_logits.sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        assert torch.allclose(grad, checkpointed[name], atol=1e-4, rtol=1e-3), name


# Losses and outputs


@torch.no_grad()
def test_loss_is_cross_entropy_of_the_answering_exit(tiny_model: GeepForSequenceClassification) -> None:
    inputs, labels = padded(), torch.tensor([0, 1, 2, 1, 0])
    for layer in (None, 2):
        output = tiny_model(**inputs, labels=labels, exit_layer=layer)
        by_hand = -torch.stack([row.log_softmax(0)[y] for row, y in zip(output.logits, labels, strict=True)]).mean()
        assert float(output.loss) == pytest.approx(float(by_hand), rel=1e-5)
    assert tiny_model(**inputs).loss is None


@torch.no_grad()
def test_multi_label_loss_treats_each_label_as_a_yes_or_no() -> None:
    model = make_model(problem_type="multi_label_classification")
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]])
    output = model(**padded(), labels=labels)
    p = output.logits.sigmoid()
    by_hand = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert float(output.loss) == pytest.approx(float(by_hand), rel=1e-4)


@torch.no_grad()
def test_a_plain_tuple_is_returned_where_asked_for(tiny_model: GeepForSequenceClassification) -> None:
    inputs = padded()
    output = tiny_model(**inputs, labels=torch.zeros(5, dtype=torch.int64), return_dict=False)
    assert isinstance(output, tuple)
    assert torch.equal(output[1], tiny_model(**inputs).logits)


@torch.no_grad()
def test_the_model_keeps_nothing_of_a_call(tiny_model: GeepForSequenceClassification) -> None:
    inputs = padded()
    before = dict(vars(tiny_model))
    expected = tiny_model(**inputs).logits
    tiny_model(**inputs, exit_layer=1, output_exits=True)
    tiny_model(**padded(seed=3, rows=2), output_shared_exits=True, output_hidden_states=True)
    assert torch.equal(tiny_model(**inputs).logits, expected)
    assert vars(tiny_model).keys() == before.keys()


def test_segment_ids_reach_encoders_that_have_them_and_no_others() -> None:
    inputs = padded()
    plain = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    for family, row in FAMILIES.items():
        model = make_model(family)
        with torch.no_grad():
            same = torch.equal(model(**inputs).logits, model(**plain).logits)
        assert same != row.has_token_type_ids, family


# Config


def test_exits_sit_below_the_last_but_one_layer_by_default() -> None:
    assert make_model(exit_layers=None).config.depths == (1, 2, 4)
    config = GeepConfig()
    assert config.exit_layers == list(range(1, 11))
    assert config.num_hidden_layers == 12
    assert GeepConfig(encoder_config={"model_type": "bert", "num_hidden_layers": 2}).exit_layers == []


@pytest.mark.parametrize("layers", [(0, 1), (1, 4), (2, 1), (1, 1), (-1,)])
def test_exit_layers_out_of_order_or_range_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must ascend within 1..3"):
        make_model(exit_layers=layers)


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown exit_head 'max'.*attention"):
        make_model(head="max")


def test_an_unsupported_family_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="Unsupported encoder 'gpt2'.*bert"):
        GeepConfig(encoder_config=AutoConfig.for_model("gpt2"))


def test_an_encoder_with_a_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="conv_kernel_size=3"):
        GeepConfig(encoder_config=AutoConfig.for_model("deberta-v2", conv_kernel_size=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_labels= or label_names="),
        ({"num_labels": 3, "label_names": ["a", "b"]}, "num_labels=3 but 2 label_names"),
        ({"num_labels": 1}, "at least two labels"),
        ({"num_labels": 0, "problem_type": "multi_label_classification"}, "at least"),
    ],
)
def test_labels_that_make_no_classifier_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeepForSequenceClassification.from_encoder(tiny_encoder("bert"), **arguments)


# Saving and loading


@every_family
@every_head
@torch.no_grad()
def test_a_saved_model_loads_the_same(family: str, head: str, tmp_path: Path) -> None:
    model, inputs = make_model(family, head=head), padded()
    expected = model(**inputs, output_exits=True).exit_logits
    model.save_pretrained(tmp_path)
    for loaded in (
        GeepForSequenceClassification.from_pretrained(tmp_path),
        AutoModelForSequenceClassification.from_pretrained(str(tmp_path)),
    ):
        assert type(loaded) is GeepForSequenceClassification
        assert loaded.config.depths == model.config.depths
        assert loaded.config.id2label == model.config.id2label
        assert torch.equal(loaded.eval()(**inputs, output_exits=True).exit_logits, expected)
    assert not list(tmp_path.glob("*.bin"))


def test_a_plain_encoder_is_refused_with_the_call_that_was_meant(tmp_path: Path) -> None:
    tiny_encoder("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'bert' model, expected 'geep'.*from_encoder\(path, num_labels"):
        GeepForSequenceClassification.from_pretrained(tmp_path)


@every_family
@torch.no_grad()
def test_exits_go_on_a_plain_encoder_in_a_folder(family: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(family)
    encoder.save_pretrained(tmp_path)
    model = GeepForSequenceClassification.from_encoder(str(tmp_path), label_names=["no", "yes"]).eval()
    inputs = for_encoder(encoder, padded())
    assert torch.equal(model.encoder.eval()(**inputs).last_hidden_state, encoder(**inputs).last_hidden_state)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.label2id == {"no": 0, "yes": 1}
    assert model.config.num_labels == 2


@every_family
@torch.no_grad()
def test_the_first_layers_of_an_encoder_are_those_of_the_whole(family: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(family)
    encoder.save_pretrained(tmp_path)
    cut = GeepForSequenceClassification.from_encoder(str(tmp_path), num_labels=2, num_layers=2).eval()
    inputs = for_encoder(encoder, padded())
    calls = layer_calls(encoder, inputs)
    hidden = calls.embedding_output
    for call in calls.layers[:2]:
        hidden = call(hidden)
    norm = FAMILIES[family].final_norm
    expected = hidden if norm is None else encoder.get_submodule(norm)(hidden)
    assert torch.allclose(cut.encoder(**inputs).last_hidden_state, expected, atol=1e-6)
    assert cut.config.num_hidden_layers == 2
    cut.save_pretrained(tmp_path / "cut")
    loaded = GeepForSequenceClassification.from_pretrained(tmp_path / "cut").eval()
    assert torch.equal(loaded(**padded()).logits, cut(**padded()).logits)


def test_more_layers_than_there_are_are_refused(tmp_path: Path) -> None:
    tiny_encoder("bert").save_pretrained(tmp_path)
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"first {count} layers are asked for, the encoder has 4"):
            GeepForSequenceClassification.from_encoder(str(tmp_path), num_labels=2, num_layers=count)
    with pytest.raises(ValueError, match="one in memory; cut it before"):
        GeepForSequenceClassification.from_encoder(tiny_encoder("bert"), num_labels=2, num_layers=2)


def test_an_encoder_in_memory_leaves_no_pooler_behind(tmp_path: Path) -> None:
    model = GeepForSequenceClassification.from_encoder(BertModel(tiny_encoder("bert").config), num_labels=2)
    model.save_pretrained(tmp_path)
    loaded = GeepForSequenceClassification.from_pretrained(tmp_path)
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_hugging_faces_pipeline_runs_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["w1 w2 w3", "w9", "w4 w5 w6 w7 w8"]
    found = classify(texts, batch_size=2)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**encoded).logits.softmax(-1)
    assert [row["label"] for row in found] == [f"LABEL_{i}" for i in expected.argmax(-1).tolist()]
    assert [row["score"] for row in found] == pytest.approx(expected.amax(-1).tolist(), abs=1e-5)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_heads_answer_alike_wherever_the_padding_is(head: str) -> None:
    model = make_model(head=head)
    hidden = torch.randn(3, 5, 32)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    left = torch.stack([row.roll(5 - int(keep.sum()), 0) for row, keep in zip(hidden, mask, strict=True)])
    with torch.no_grad():
        expected = model.teacher(hidden, mask)
        assert torch.allclose(model.teacher(left, mask.flip(1)), expected, atol=1e-5)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    encoder = tiny_encoder("bert")
    encoder.save_pretrained(tmp_path / "whole")
    assert GeepForSequenceClassification.from_encoder(str(tmp_path / "whole"), num_labels=2)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "other")
    renamed = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks .* weights of a bert encoder.*no place for, such as 'backbone"):
        GeepForSequenceClassification.from_encoder(str(tmp_path / "other"), num_labels=2)


# Gradient equilibrium


def own_losses(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss of every classifier, the full model's last; several labels where they are a row of ones and zeros."""
    if labels.ndim == 1:
        return [F.cross_entropy(row, labels) for row in logits]
    return [F.binary_cross_entropy_with_logits(row, labels) for row in logits]


@pytest.mark.parametrize("exit_layers", [(1, 2, 3), (2,), (1, 3)])
@every_family
def test_in_gradient_equilibrium_a_layer_hears_the_mean_of_the_classifiers_behind_it(
    family: str, exit_layers: tuple[int, ...]
) -> None:
    model, inputs = make_model(family, exit_layers=exit_layers).double(), padded()
    labels = torch.tensor([0, 1, 2, 0, 1])
    plain = model(**inputs, output_exits=True, output_hidden_states=True)
    balanced = model(**inputs, output_exits=True, output_hidden_states=True, gradient_equilibrium=True)
    assert torch.equal(plain.exit_logits, balanced.exit_logits)
    found = torch.autograd.grad(sum(own_losses(balanced.exit_logits, labels)), balanced.hidden_states)
    depths = model.config.depths
    apart = [
        torch.autograd.grad(loss, plain.hidden_states[: depth + 1], retain_graph=True)
        for depth, loss in zip(depths, own_losses(plain.exit_logits, labels), strict=True)
    ]
    for layer, gradient in enumerate(found):
        behind = [own[layer] for depth, own in zip(depths, apart, strict=True) if depth >= layer]
        expected = torch.stack(behind).mean(0)
        assert torch.allclose(gradient, expected, atol=1e-6), layer  # ModernBERT's rotations are float32 all the same


@pytest.mark.parametrize("several", [False, True])
@every_head
def test_in_gradient_equilibrium_classifiers_learn_as_without(head: str, several: bool) -> None:
    kind = "multi_label_classification" if several else "single_label_classification"
    model, inputs = make_model(head=head, problem_type=kind).double(), padded()
    labels = torch.tensor([0, 1, 2, 0, 1])
    if several:
        labels = F.one_hot(labels, 3).double()
    names, weights = zip(*model.named_parameters(), strict=True)
    plain = own_losses(model(**inputs, output_exits=True).exit_logits, labels)
    apart = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in plain]
    balanced = own_losses(model(**inputs, output_exits=True, gradient_equilibrium=True).exit_logits, labels)
    found = torch.autograd.grad(torch.stack(balanced).sum(), weights)
    for name, gradient, *own in zip(names, found, *apart, strict=True):
        layer = int(name.split(".")[3]) + 1 if name.startswith("encoder.encoder.layer.") else 0
        behind = sum(depth >= layer for depth in model.config.depths) if name.startswith("encoder.") else 1
        expected = sum(own) / behind
        assert torch.allclose(gradient, expected, atol=1e-12), name


def test_gradient_equilibrium_counts_the_classifiers_that_run() -> None:
    model, inputs, labels = make_model().double(), padded(), torch.tensor([0, 1, 2, 0, 1])
    weight = model.encoder.encoder.layer[0].output.dense.weight
    plain = own_losses(model(**inputs, exit_layer=2, output_exits=True).exit_logits, labels)
    (expected,) = torch.autograd.grad(torch.stack(plain).mean(), weight)
    output = model(**inputs, exit_layer=2, output_exits=True, gradient_equilibrium=True)
    (found,) = torch.autograd.grad(torch.stack(own_losses(output.exit_logits, labels)).sum(), weight)
    assert torch.allclose(found, expected, atol=1e-12)
    with pytest.raises(ValueError, match="balances exits, found shared exits"):
        model(**inputs, output_exits=True, output_shared_exits=True, gradient_equilibrium=True)
