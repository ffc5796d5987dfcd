"""How an engine runs: what is asked for becomes device, dtype, backend and longest text.

Read `EngineConfig` (asked for), `Deployment` (what it became), `load_model`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from geep.backends import BACKENDS, Backend, CudaOptions
from geep.backends.int8 import ActivationRanges, largest_weight
from geep.backends.likeness import unlike_hugging_face
from geep.backends.onednn import multiplies_bfloat16
from geep.backends.protocol import TORCH_DTYPES
from geep.engine.admission import check_model, longest_text
from geep.engine.cost import batch_tokens
from geep.folder import HubOptions
from geep.modeling import GeepForSequenceClassification
from geep.modeling.custom_code import refused_custom_code
from geep.modeling.devices import usable_device

logger = logging.getLogger(__name__)

# Dtypes an engine may be asked for; which of them a backend runs, it says itself.
DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine runs. What it decides is in `ExitSettings`.

    Attributes:
        backend: Row of `BACKENDS`; None: packed (cuda on a GPU) where the encoder's config allows it, else padded.
        device: "cpu", "cuda", …; None: a GPU where there is one.
        dtype: One of `DTYPES`; None: that in which a folder was certified, else the backend's default: bfloat16 on a
            GPU, and packed on a CPU that multiplies it itself, else float32. "int8" multiplies in 8 bits.
        max_batch_tokens: Tokens of a staircase; None: enough for the encoder's size (`batch_tokens`).
        window_tokens: Tokens sorted together; bounds memory, since the survivors of a window wait in it.
        max_length: Longest text in tokens; None: the model's limit. Longer texts are cut and say so.
        compile: Whether the cuda backend compiles its layer and replays graphs of small batches: slower at first,
            faster then. None: on a GPU.
    """

    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_batch_tokens: int | None = None
    window_tokens: int = 2**17
    max_length: int | None = None
    compile: bool | None = None

    def __post_init__(self) -> None:
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"Unknown backend {self.backend!r}; known: {sorted(BACKENDS)}.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, got {self.dtype!r}.")
        for name in ("max_batch_tokens", "window_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_length is not None and self.max_length < 3:
            raise ValueError(f"max_length must be at least 3 (two special tokens, one of text), got {self.max_length}.")

    def as_certified(self, made_with: Mapping[str, Any] | None, *, is_uncertified: bool = False) -> EngineConfig:
        """Return it with dtype and backend of what was certified, where they are not named and the device is the same.

        Args:
            made_with: `Deployment.made_with` of what was certified; None where nothing was.
            is_uncertified: Whether there are exits of which nothing is certified: then nothing is rounded on a CPU.
        """
        if made_with is None and not (is_uncertified and self.dtype is None):
            return self
        device = _device(self.device).type
        if made_with is None:
            return replace(self, dtype="float32") if device == "cpu" else self
        if device != made_with.get("device"):
            return self
        # "packed" is what is chosen anyway, unless its layers turn out not to be the encoder's here.
        backend = "padded" if self.backend is None and made_with.get("backend") == "padded" else self.backend
        dtype = self.dtype
        if dtype is None:
            dtype = made_with.get("dtype")
            if not _runs(dtype, backend or made_with.get("backend"), device):
                logger.warning(
                    "The exits are those of %s, which this machine does not run: running in its default dtype, which "
                    "gives nearly the same answers.",
                    dtype,
                )
                dtype = None
        return replace(self, dtype=dtype, backend=backend)


class EngineOptions(TypedDict, total=False):
    """The fields of `EngineConfig` as keywords, for type checkers; a test holds the two together."""

    backend: str | None
    device: str | None
    dtype: str | None
    max_batch_tokens: int | None
    window_tokens: int
    max_length: int | None
    compile: bool | None


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model as it runs on this machine.

    Attributes:
        model: On its device, not in training, in the dtype that its backend wants: float32 where that rounds by itself.
        dtype: One of `DTYPES`.
        backend: Runs the encoder's layers and the exits.
        backend_name: Row of `BACKENDS`.
        weight_bits: Bits of a weight in the encoder's products.
        max_length: Longest text in tokens.
        max_batch_tokens: Tokens of a staircase.
    """

    model: GeepForSequenceClassification
    dtype: str
    backend: Backend[Any]
    backend_name: str
    weight_bits: int
    max_length: int
    max_batch_tokens: int

    @classmethod
    def of(
        cls,
        model: GeepForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig,
        ranges: ActivationRanges | None,
    ) -> Deployment:
        """Take a model over: move it to the device, cast it where the backend wants that, and build the backend.

        Raises:
            ValueError: As `check_model` and `longest_text`; or if the device cannot run the dtype, or the backend
                cannot run the encoder.
        """
        check_model(model, tokenizer)
        max_length = longest_text(config.max_length, model, tokenizer)
        device = _device(config.device)
        model = model.train(mode=False)
        for part in model.modules():
            # A layer in pieces saves memory, which staircases bound already, and refuses lengths that leave a rest.
            if hasattr(part, "chunk_size_feed_forward"):
                part.chunk_size_feed_forward = 0  # type: ignore[assignment]
        backend_name = _backend_name(config.backend, model, device, max_length)
        dtype = _dtype(config.dtype, backend_name, device)
        model = nn.Module.to(model, device=device, dtype=BACKENDS[backend_name].model_dtype(dtype, device.type))
        backend = _build_backend(backend_name, model, dtype, ranges, config.compile)
        return cls(
            model,
            dtype,
            backend,
            backend_name,
            # Weights of fewer bits answer otherwise: a promise made with 8 does not cover them.
            _weight_bits(dtype),
            max_length,
            config.max_batch_tokens or batch_tokens(model.encoder.config, dtype, device.type),
        )

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied, and with it the engine: packed weights and threads are of one process."""
        raise TypeError(
            "An engine is neither pickled nor copied: load it in each process, after it has started, with "
            "Engine.from_pretrained(folder). Engine.replace gives one with other settings on the same weights."
        )

    @property
    def is_rounded(self) -> bool:
        """Whether it answers in fewer bits than the model that it holds, which promises are then about."""
        return self.dtype != "float32" and self.model.dtype == torch.float32

    @property
    def made_with(self) -> dict[str, str | int]:
        """All of it that answers depend on beyond rounding."""
        return {
            "backend": self.backend_name,
            "device": self.model.device.type,
            "dtype": self.dtype,
            "weight_bits": self.weight_bits,
            "max_length": self.max_length,
        }

    @property
    def advice_on_overflow(self) -> str:
        """What to do where logits are not finite."""
        if self.dtype == "float32":
            return "The model overflows even in float32: its weights are out of range; train or copy it again."
        return f"The dtype is {self.dtype}; try float32."

    @property
    def deployed_as(self) -> str:
        """The same in words."""
        weights = "" if self.weight_bits != 7 else " with 7-bit weights"
        return f"{self.backend_name}, {self.dtype}{weights}, at most {self.max_length} tokens"


def _weight_bits(dtype: str) -> int:
    if dtype == "int8":
        return 8 if largest_weight() == 127 else 7
    return torch.finfo(TORCH_DTYPES[dtype]).bits


def load_model(
    path: str | Path, hub: HubOptions | None = None
) -> tuple[GeepForSequenceClassification, PreTrainedTokenizerBase]:
    """Load model (float32) and tokenizer of a folder or of the hub, whole or not at all.

    Args:
        path: Folder or model id.
        hub: How a model of the hub is had; None: its defaults.

    Raises:
        OSError: If there is no such model.
        ValueError: If the weights are damaged or do not cover the model, or the tokenizer needs code of its own.
    """
    name, options = str(path), {} if hub is None else hub.keywords()
    try:
        model, info = GeepForSequenceClassification.from_pretrained(
            name,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, in one message
            **options,
        )
    except OSError as error:
        if Path(path).exists():
            raise
        raise OSError(f"There is no folder {name}, and as a model of the hub it cannot be had: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"The weights of {path} are damaged ({error}); copy or train the model again.") from error
    except StrictDataclassError as error:  # old versions check a config's fields themselves
        raise ValueError(f"config.json of {path} is damaged: {error}. Copy or train the model again.") from error
    except KeyError as error:
        raise ValueError(
            f"config.json of {path} names {error}, which this version of transformers does not know; mend it, or "
            "install the version that wrote it."
        ) from error
    if info["mismatched_keys"]:
        raise ValueError(_other_shapes(str(path), model, info["mismatched_keys"]))
    if info["missing_keys"]:
        raise ValueError(
            f"The weights of {path} lack {len(info['missing_keys'])} tensors, such as {min(info['missing_keys'])!r}; "
            "the file belongs to another model or was cut. Copy or train the model again."
        )
    if info["unexpected_keys"]:
        raise ValueError(
            f"The weights of {path} hold {len(info['unexpected_keys'])} tensors that the model has no place for, such "
            f"as {min(info['unexpected_keys'])!r}; config.json belongs to another model. Copy or train the model again."
        )
    with refused_custom_code(name):
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)


def _other_shapes(path: str, model: GeepForSequenceClassification, found: Iterable[tuple[str, Any, Any]]) -> str:
    """Say of weights that have other shapes than the config gives them."""
    name, stored, made = min(found, key=lambda row: row[0])
    if ".out." in name:
        return (
            f"The weights of {path} have {stored[0]} labels, and config.json names {made[0]} "
            f"({model.config.id2label}); id2label has to name each label, from 0 on."
        )
    return (
        f"The weights of {path} have other shapes than config.json says: {name!r} has {tuple(stored)}, expected "
        f"{tuple(made)}; config.json belongs to another model. Copy or train the model again."
    )


def default_backend(config: PreTrainedConfig, device: torch.device) -> str:
    """Name of the first backend that runs encoders with this config on a device."""
    names = ("cuda", *BACKENDS) if device.type == "cuda" else BACKENDS
    return next(name for name in names if BACKENDS[name].supports(config))


def _backend_name(
    asked: str | None, model: GeepForSequenceClassification, device: torch.device, max_length: int
) -> str:
    """Choose a backend, and try whether its layers are the encoder's."""
    name = default_backend(model.encoder.config, device) if asked is None else asked
    unlike = None if name == "padded" else unlike_hugging_face(model, packed=True, max_length=max_length)
    if unlike is not None:
        if asked is not None:
            raise ValueError(f"{unlike}. Use backend='padded', which runs the encoder's own layers.")
        logger.warning("%s. Running padded, which is right and slower.", unlike)
        name = "padded"
    if name == "padded":
        unlike = unlike_hugging_face(model, packed=False, max_length=max_length)
        if unlike is not None:
            raise ValueError(f"{unlike}. Nothing here can run it layer by layer; use Hugging Face's model as it is.")
    return name


def _build_backend(
    name: str,
    model: GeepForSequenceClassification,
    dtype: str,
    ranges: ActivationRanges | None,
    compiles: bool | None,
) -> Backend[Any]:
    backend = BACKENDS[name]
    if name == "cuda" and compiles is not None:
        options = CudaOptions(compile=compiles, graphs=None if compiles else False)
        return backend.build(model, dtype=dtype, ranges=ranges, options=options)
    if compiles:
        raise ValueError(f"compile=True is for the cuda backend, found {name!r}; leave it out.")
    return backend.build(model, dtype=dtype, ranges=ranges)


def _device(asked: str | None) -> torch.device:
    if asked is None:
        found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info("Running on %s.", found)
        return found
    return usable_device(asked)


def _runs(dtype: Any, backend: Any, device: str) -> bool:
    """Whether a backend runs a dtype here."""
    return backend in BACKENDS and dtype in BACKENDS[backend].dtypes(device) and not _is_slow(dtype, device)


def _is_slow(dtype: str, device: str) -> bool:
    """Whether a dtype takes longer than float32 on this machine's device of a kind."""
    return device == "cpu" and dtype == "bfloat16" and not multiplies_bfloat16()


def _dtype(asked: str | None, backend: str, device: torch.device) -> str:
    known = BACKENDS[backend].dtypes(device.type)
    if not known:
        raise ValueError(f"The {backend} backend does not run on {device.type}; use device='cpu' or another backend.")
    if asked is None:
        return known[0]
    if asked not in known:
        others = [name for name, row in BACKENDS.items() if asked in row.dtypes(device.type)]
        raise ValueError(
            f"{asked} is not run by the {backend} backend on {device.type}, which runs {' or '.join(known)}; "
            f"use one of them{f', or backend={others[0]!r}' if others else ''}."
        )
    if _is_slow(asked, device.type):
        raise ValueError("This CPU has no AVX-512 BF16, on others bfloat16 is slower than float32; use float32.")
    return asked
