"""One way to say how far a long piece of work has come."""

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done, and how much there is in all (None: not known)."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """Say nothing: the default of everything that takes a `progress`."""
