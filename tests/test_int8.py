"""Layers on oneDNN's kernels and in 8 bits, against the plain ones."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_engine, make_model, make_tokenizer, random_batch, random_texts, toy_task
from hypothesis import given, strategies as st
from torch import Tensor

from geep.backends import PackedBackend, int8, onednn
from geep.backends.int8 import SITES, ActivationRanges, Int8Layer, Int8Linear, observe, rounded_linear
from geep.backends.layout import Layout
from geep.backends.onednn import FUSED_ACTIVATIONS, FusedLayer, FusedLinear, pad_rows
from geep.backends.packed_layer import packed_layers
from geep.calibration import profile, quantise
from geep.data import Split
from geep.engine import Engine, EngineConfig, ExitSettings
from geep.folder import RANGES_NAME
from geep.modeling import GeepForSequenceClassification

pytestmark = pytest.mark.skipif(not int8.is_available(), reason="this build of torch has no oneDNN")

LAYOUT = Layout(np.array([3, 3, 5, 1, 0, 20]))


def hidden_states(model: GeepForSequenceClassification, *, seed: int = 0, tokens: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, model.config.hidden_size, generator=generator)


def ranges_of(model: GeepForSequenceClassification, *batches: tuple[Tensor, Layout]) -> ActivationRanges:
    with torch.no_grad():
        return observe(packed_layers(model), batches or [(hidden_states(model), LAYOUT)])


# Fused layers


@pytest.mark.parametrize("activation", [*FUSED_ACTIVATIONS, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_fused_layer_equals_the_plain_one(activation: str, dtype: torch.dtype) -> None:
    model = make_model(hidden_act=activation).to(dtype)
    plain = packed_layers(model)[1]
    hidden = hidden_states(model).to(dtype)
    expected, found = plain(hidden, LAYOUT), FusedLayer.of(plain)(hidden, LAYOUT)
    assert found.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 6e-2
    assert torch.allclose(found, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_a_fused_linear_layer_adds_and_leaves_its_inputs_alone() -> None:
    weight, bias, x, residual = torch.randn(8, 5), torch.randn(8), torch.randn(7, 5), torch.randn(7, 8)
    before = residual.clone()
    found = FusedLinear.of(weight, bias).plus(x, residual)
    assert torch.allclose(found, x @ weight.T + bias + before, atol=1e-5)
    assert torch.equal(residual, before)


# 8 bits


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_an_8_bit_linear_layer_is_off_by_rounding_only(seed: int, width: int, out: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    bias = torch.randn(out, generator=generator)
    # Channels of very different ranges, off centre.
    spread = torch.logspace(-2, 2, width)
    x = (torch.randn(rows, width, generator=generator) + 0.7) * spread
    low, high = x.amin(0), x.amax(0)
    linear = Int8Linear.of(rounded_linear(weight, bias, (low, high)))
    with torch.no_grad():
        found = linear(linear.quantise(x))
    step_x = (high.clamp(min=0) - low.clamp(max=0)) / 255
    half_w = linear.weight_scale / 2
    # Half a step for each input through its weight, half a step for each (scaled) weight through its input's number.
    most = (0.5 * step_x) @ weight.abs().T + half_w * 255 * width + 1e-3 * (1 + bias.abs())
    assert torch.all((found - (x @ weight.T + bias)).abs() <= most * 1.01)


@torch.no_grad()
def test_values_outside_the_observed_range_are_cut_to_it() -> None:
    linear = Int8Linear.of(
        rounded_linear(torch.eye(3), torch.zeros(3), (torch.full((3,), -1.0), torch.full((3,), 2.0)))
    )
    found = linear(linear.quantise(torch.tensor([[-100.0, 0.0, 100.0]])))
    assert torch.allclose(found, torch.tensor([[-1.0, 0.0, 2.0]]), atol=0.02)


@pytest.mark.parametrize(
    ("vnni", "machine", "largest"), [(True, "x86_64", 127), (False, "AMD64", 64), (False, "arm64", 127)]
)
@torch.no_grad()
def test_weights_have_7_bits_where_the_cpu_would_overflow(
    vnni: bool, machine: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    linear = Int8Linear.of(
        rounded_linear(torch.eye(3), torch.zeros(3), (torch.full((3,), -1.0), torch.full((3,), 2.0)))
    )
    # A step of the inputs is folded into the weights: the largest of each output is the largest there is.
    assert torch.allclose(linear.weight_scale * largest, torch.full((3,), 3 / 255))


@pytest.mark.parametrize("activation", sorted(FUSED_ACTIVATIONS))
@torch.no_grad()
def test_an_8_bit_layer_is_near_the_plain_one(activation: str) -> None:
    model = make_model(hidden_act=activation, intermediate_size=96)
    ranges = ranges_of(model)
    hidden = hidden_states(model)
    for number, plain in enumerate(packed_layers(model)):
        expected, found = plain(hidden, LAYOUT), Int8Layer.of(plain, ranges, number)(hidden, LAYOUT)
        assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()
        hidden = expected


@torch.no_grad()
def test_the_widest_channels_stay_in_float() -> None:
    model = make_model(intermediate_size=96)
    plain = packed_layers(model)[0]
    plain.up[0][7] *= 300  # one channel far beyond the others
    ranges = ranges_of(model)
    hidden = hidden_states(model)
    expected = plain(hidden, LAYOUT)
    error = (Int8Layer.of(plain, ranges, 0)(hidden, LAYOUT) - expected).abs().mean()
    assert error < 0.02 * expected.abs().mean()


@torch.no_grad()
def test_an_answer_in_8_bits_does_not_depend_on_the_texts_beside_it() -> None:
    model = make_model()
    batch = random_batch(9, seed=3)
    packed = PackedBackend.build(model, dtype="float32")
    live = packed.start(batch)
    built = PackedBackend.build(model, dtype="int8", ranges=ranges_of(model, (live.hidden, live.layout)))
    live = built.start(batch)
    for layer in range(1, model.config.num_hidden_layers + 1):
        live = built.advance(live, layer, len(batch))
    together = built.exit_logits(live, model.config.num_hidden_layers, 0, len(batch))
    for row in range(len(batch)):
        one = built.start(batch.select(np.array([row])))
        for layer in range(1, model.config.num_hidden_layers + 1):
            one = built.advance(one, layer, 1)
        single = built.exit_logits(one, model.config.num_hidden_layers, 0, 1)
        assert torch.allclose(single[0], together[row], atol=1e-4)


# Ranges


@torch.no_grad()
def test_ranges_hold_every_value_whatever_the_batches() -> None:
    model = make_model()
    first, second = hidden_states(model, seed=1), hidden_states(model, seed=2)
    whole = ranges_of(model, (first, LAYOUT), (second, LAYOUT))
    parts = [ranges_of(model, (first, LAYOUT)), ranges_of(model, (second, LAYOUT))]
    for site in SITES:
        low = torch.minimum(*(part.sites[site][:, 0] for part in parts))
        high = torch.maximum(*(part.sites[site][:, 1] for part in parts))
        assert torch.equal(whole.sites[site], torch.stack([low, high], dim=1))
    low, high = whole.of(0, "qkv")
    assert torch.equal(low, torch.cat([first, second]).amin(0))
    assert torch.equal(high, torch.cat([first, second]).amax(0))
    with pytest.raises(ValueError, match="no token to observe"):
        observe(packed_layers(model), [])


def test_ranges_are_kept_and_refused_where_they_do_not_belong(tmp_path: Path) -> None:
    model = make_model()
    ranges = ranges_of(model)
    path = ranges.save(tmp_path, fingerprint={"model": "a" * 64, "tokenizer": "t"})
    assert path == tmp_path / f"{RANGES_NAME}-{ranges.digest[:16]}.safetensors"
    again = ActivationRanges.load(path, fingerprint={"model": "a" * 64})
    assert all(torch.equal(again.sites[site], ranges.sites[site]) for site in SITES)
    with pytest.raises(ValueError, match="observed on model aaaa.*run `geep profile --dtype int8` again"):
        ActivationRanges.load(path, fingerprint={"model": "b" * 64})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be used"):
        ActivationRanges.load(path, fingerprint={"model": "a" * 64})
    with pytest.raises(ValueError, match="finite and ascending"):
        ActivationRanges({site: -tensor for site, tensor in ranges.sites.items()})
    other = make_model(intermediate_size=48)
    with pytest.raises(ValueError, match="'down' have .* channels, the model 48"):
        PackedBackend.build(other, dtype="int8", ranges=ranges)


# Engines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "model"
    make_engine(table=False).save_pretrained(path)
    return path


def test_int8_needs_ranges_and_says_how_to_get_them(folder: Path) -> None:
    with pytest.raises(ValueError, match="found none; run `geep profile MODEL --dtype int8`"):
        Engine.from_pretrained(folder, device="cpu", dtype="int8")


def test_int8_on_a_backend_that_has_none_names_one_that_has() -> None:
    with pytest.raises(ValueError, match="int8 is not run by the padded backend on cpu.*or backend='packed'"):
        Engine(make_model(), make_tokenizer(), config=EngineConfig(device="cpu", backend="padded", dtype="int8"))


@pytest.mark.parametrize(("vnni", "weights"), [(True, ""), (False, " with 7-bit weights")])
def test_an_int8_engine_says_what_it_runs(vnni: bool, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    model, config = make_model(), EngineConfig(device="cpu", dtype="int8")
    engine = Engine(model, make_tokenizer(), config=config, ranges=ranges_of(model))
    assert engine.deployment.dtype == "int8"
    assert engine.deployment.deployed_as == f"packed, int8{weights}, at most 64 tokens"


def test_an_int8_engine_is_kept_with_its_ranges_and_is_near_float32(folder: Path) -> None:
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32", max_length=20)
    texts = random_texts(60, seed=4)
    made = quantise(engine, Split(random_texts(200, seed=5)))
    made.save_exits(folder)
    again = Engine.from_pretrained(folder, device="cpu", dtype="int8", max_length=20)
    weights = "" if int8.largest_weight() == 127 else " with 7-bit weights"
    assert made.deployment.deployed_as == again.deployment.deployed_as == f"packed, int8{weights}, at most 20 tokens"
    batch = engine.tokenize(texts).batch
    full = engine.run_tokens(batch, settings=ExitSettings()).logits
    found = again.run_tokens(batch, settings=ExitSettings()).logits
    assert torch.equal(found, made.run_tokens(batch, settings=ExitSettings()).logits)
    assert 0 < (found - full).abs().mean() < 0.05 * full.abs().mean()
    assert torch.equal(again.in_float32().run_tokens(batch, settings=ExitSettings()).logits, full)


@pytest.mark.bfloat16
def test_an_engine_that_has_cast_its_weights_has_no_float32_left(folder: Path) -> None:
    engine = Engine.from_pretrained(folder, device="cpu", dtype="bfloat16", backend="padded")
    with pytest.raises(ValueError, match=r"cast to torch.bfloat16; load the model again"):
        engine.in_float32()


def test_a_quantised_model_that_is_far_off_is_refused() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    good = Engine(model, tokenizer, config=EngineConfig(device="cpu"))
    texts, _ = toy_task(200, seed=7)
    batch = good.tokenize(texts).batch
    packed = PackedBackend.build(model, dtype="float32")
    with torch.no_grad():
        live = packed.start(batch)
        ranges = observe(packed_layers(model), [(live.hidden, live.layout)])
    narrow = ActivationRanges({site: tensor * 0.02 for site, tensor in ranges.sites.items()})
    labels = good.run_tokens(batch, settings=ExitSettings()).logits.argmax(1).numpy()
    split = Split(texts, labels=labels)
    broken = Engine(model, tokenizer, config=EngineConfig(device="cpu", dtype="int8"), ranges=narrow)
    with pytest.raises(ValueError, match=r"int8 loses .* points of accuracy of the float32 model on 200 held-out"):
        profile(broken, split, split)
    with pytest.raises(ValueError, match=r"int8 loses .* % of the answers"):
        profile(broken, Split(texts), Split(texts))


def test_a_layer_whose_activation_cannot_be_fused_is_refused_in_8_bits() -> None:
    model = make_model(hidden_act="silu")
    with pytest.raises(ValueError, match="int8 runs the activations .*'silu'"):
        PackedBackend.build(model, dtype="int8", ranges=ranges_of(model))


def test_without_onednn_the_plain_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    monkeypatch.setattr(int8, "is_available", lambda: False)
    assert PackedBackend.dtypes("cpu") == ("float32", "bfloat16")
    model, batch = make_model(), random_batch(5)
    engine = Engine(model, make_tokenizer(), config=EngineConfig(device="cpu"), settings=ExitSettings())
    plain = engine.run_tokens(batch, settings=ExitSettings()).logits
    monkeypatch.undo()
    fused = (
        Engine(model, make_tokenizer(), config=EngineConfig(device="cpu"))
        .run_tokens(batch, settings=ExitSettings())
        .logits
    )
    assert torch.allclose(plain, fused, atol=1e-4)


# Sizes


def test_rows_are_padded_to_few_sizes_and_hardly_more_rows() -> None:
    sizes = {len(pad_rows(torch.zeros(count, 1))) for count in range(1, 8193)}
    assert len(sizes) <= 16 * 9
    for count in (1, 8, 9, 100, 513, 2000, 8191):
        x = torch.randn(count, 3)
        padded = pad_rows(x)
        assert torch.equal(padded[:count], x)
        assert not padded[count:].any()
        assert len(padded) < count + 8 or len(padded) <= 1.07 * count


@torch.no_grad()
def test_padding_rows_never_meet_a_text() -> None:
    model = make_model(intermediate_size=96)
    plain, ranges = packed_layers(model)[0], ranges_of(model)
    layout = Layout(np.array([7, 7, 3]))
    hidden = hidden_states(model, tokens=17)  # padded to 24
    for layer in (FusedLayer.of(plain), Int8Layer.of(plain, ranges, 0)):
        found = layer(hidden, layout)
        assert found.shape == hidden.shape
        one = layer(hidden[:7], Layout(np.array([7])))
        assert torch.allclose(found[:7], one, atol=1e-5)
