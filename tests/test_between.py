"""What stands between two 8-bit products, in one call, equals the steps of which it is made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model, random_batch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from geep.backends import PackedBackend, kernels
from geep.backends.between import ACTIVATIONS, WIDE, Between
from geep.backends.int8 import Int8Layer, observe
from geep.backends.kernels import Rounding
from geep.backends.packed import Layout
from geep.backends.packed_layer import packed_layers

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="the kernels were not compiled")

# transformers' names of the activations, by oneDNN's.
NAMES = {("gelu", "none"): "gelu", ("gelu", "tanh"): "gelu_new", ("relu", ""): "relu"}


def draw(hidden: int, *, with_biases: bool) -> dict[str, Tensor | None]:
    torch.manual_seed(hidden)
    found: dict[str, Tensor | None] = {
        "norm": torch.rand(hidden) + 0.5,
        "up": torch.randn(WIDE, hidden) / hidden**0.5,
        "down": torch.randn(hidden, WIDE) / WIDE**0.5,
        "step": torch.rand(hidden) * 20 + 20,
        "zero": torch.rand(hidden) * 30 + 110.5,
        "norm_bias": torch.randn(hidden) if with_biases else None,
        "up_bias": torch.randn(WIDE) if with_biases else None,
    }
    return found


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS), ids=str)
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 32), (5, 64), (8, 96), (23, 384), (64, 768)])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_call_equals_its_steps(
    activation: tuple[str, str], with_biases: bool, rows: int, hidden: int, threads: int
) -> None:
    parts = draw(hidden, with_biases=with_biases)
    rounding = Rounding(parts["step"], parts["zero"])
    between = Between(
        (parts["norm"], parts["norm_bias"], 1e-12),
        (parts["up"], parts["up_bias"]),
        parts["down"],
        activation,
        rounding,
    )
    sums = 3 * torch.randn(rows, hidden) + 1
    normal = F.layer_norm(sums, (hidden,), parts["norm"], parts["norm_bias"], 1e-12)
    wide = ACT2FN[NAMES[activation]](F.linear(normal, parts["up"], parts["up_bias"]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    added, rounded = between(sums.clone())
    torch.set_num_threads(before)
    torch.testing.assert_close(added, normal + F.linear(wide, parts["down"]), atol=1e-5, rtol=1e-5)
    # A number that lies on the border of two steps may be rounded either way.
    apart = rounded.int() - rounding(normal).int()
    assert apart.abs().max() <= 1
    assert (apart != 0).float().mean() < 0.001


def test_a_broken_row_is_broken_alone() -> None:
    parts = draw(64, with_biases=True)
    rounding = Rounding(parts["step"], parts["zero"])
    between = Between(
        (parts["norm"], parts["norm_bias"], 1e-12),
        (parts["up"], parts["up_bias"]),
        parts["down"],
        ("relu", ""),
        rounding,
    )
    sums = torch.randn(8, 64)
    whole, _ = between(sums.clone())
    sums[3, 5] = torch.nan
    broken, _ = between(sums.clone())
    others = [0, 1, 2, 4, 5, 6, 7]
    assert broken[3].isnan().all()
    assert torch.equal(broken[others], whole[others])


def test_a_row_that_overflows_is_seen() -> None:
    parts = draw(64, with_biases=False)
    norm, up, down = parts["norm"], parts["up"], parts["down"]
    between = Between((norm, None, 1e-12), (up, None), down, ("relu", ""), Rounding(parts["step"], parts["zero"]))
    added, _ = between(torch.cat([1e30 * torch.randn(1, 64), torch.randn(1, 64)]))
    assert not added[0].isfinite().any()
    assert added[1].isfinite().all()


def test_defaults_of_the_process_do_not_matter() -> None:
    parts = draw(64, with_biases=False)
    arguments = (parts["norm"], None, 1e-12), (parts["up"], None), parts["down"], ("relu", "")
    rounding, sums = Rounding(parts["step"], parts["zero"]), torch.randn(8, 64)
    expected = Between(*arguments, rounding)(sums.clone())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = Between(*arguments, rounding)(sums.clone())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@torch.no_grad()
def test_a_layer_gives_the_same_with_it_and_without(activation: str) -> None:
    model = make_model(hidden_act=activation)
    batch = random_batch(30, seed=3)
    layers, layout = packed_layers(model), Layout(batch.lengths)
    hidden = PackedBackend.build(model, dtype="float32").start(batch).hidden
    ranges = observe(layers, [(hidden, layout)])
    layer = Int8Layer.of(layers[0], ranges, 0)
    assert layer.between is not None
    found, expected = layer(hidden, layout), replace(layer, between=None)(hidden, layout)
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_layers_that_it_is_not_made_for_go_the_other_way() -> None:
    assert Between.runs(96, WIDE, ("gelu", "none"))
    assert not Between.runs(48, WIDE, ("gelu", "none"))
    assert not Between.runs(96, 16, ("gelu", "none"))
    assert not Between.runs(96, WIDE, ("swish", ""))
    assert np.array_equal(sorted(ACTIVATIONS.values()), range(len(ACTIVATIONS)))
