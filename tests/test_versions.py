"""What the package says of the versions that it works with, and where tests run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import conftest
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from geep.engine import Engine

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
# What checks or covers the code is not what the code runs on.
TOOLS = {"mypy", "pytest-cov", "ruff"}


def pins(name: str) -> dict[str, Version]:
    """Versions by package of a file of constraints."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[0-9.]+", str(each.specifier)) for each in found)
    return {each.name: Version(str(each.specifier)[2:]) for each in found}


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *EXTRAS])
def test_a_lower_bound_is_the_oldest_version_that_is_tested(requirement: str) -> None:
    needed = Requirement(requirement)
    (bound,) = needed.specifier
    assert bound.operator == ">="
    if needed.name not in TOOLS:
        assert Version(bound.version) == pins("constraints-oldest.txt")[needed.name]
    assert Version(bound.version) <= pins("constraints.txt")[needed.name]


def test_both_ends_name_the_same_packages() -> None:
    assert pins("constraints.txt").keys() == pins("constraints-oldest.txt").keys() | TOOLS


def test_a_test_that_is_not_for_gpus_finds_none(tiny_engine: Engine) -> None:
    assert torch.cuda.is_available is conftest.no_gpu
    assert torch.accelerator.is_available is conftest.no_gpu
    assert Engine(tiny_engine.model, tiny_engine.tokenizer).model.device.type == "cpu"


@pytest.mark.any_device
def test_a_test_for_any_device_finds_what_there_is() -> None:
    assert torch.cuda.is_available is not conftest.no_gpu
