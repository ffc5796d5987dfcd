"""Checkpoints that bring code of their own, which is never run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from geep.modeling.families import FAMILIES


@contextmanager
def refused_custom_code(name: str) -> Iterator[None]:
    """Say of a checkpoint that needs its own code what can be done here, where Hugging Face advises to run it.

    Raises:
        ValueError: If what is loaded inside needs such code.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} is loaded by code of its own, and code of a checkpoint is never run here; use a checkpoint of one "
            f"of the families {', '.join(FAMILIES)}."
        ) from error
