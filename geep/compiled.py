"""Libraries compiled from the package's own C++: found, loaded, or said not to be there. What they do is not known."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.util import find_spec


def load_compiled(module: str, declare: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL | None:
    """Load what was compiled when the package was installed.

    Args:
        module: Dotted name of the extension module; it is called through ctypes and never imported.
        declare: Says which arguments its functions take. An AttributeError means that it was compiled from older
            sources.

    Returns:
        The library; None where it was not compiled, cannot be loaded here, or is an older one.
    """
    found = find_spec(module)
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
        declare(library)
    except (OSError, AttributeError):
        return None
    return library
