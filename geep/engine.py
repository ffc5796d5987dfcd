"""The engine: texts in, predictions out, in the caller's order.

Life of a text: token ids → lexical exit, or predicted exit layer → staircase → exit → prediction. There is one way
through, `Engine.run_tokens`; Python callers, files and evaluation all take it.

Read in this order: `EngineConfig`, `Prediction`, `Engine.predict`, `Engine.run_tokens`, `_Run`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy
from transformers.utils.hub import cached_file

from geep.backends import BACKENDS, Backend, CudaOptions, TokenBatch
from geep.backends.int8 import ActivationRanges, largest_weight
from geep.exits import AGREEMENT, CRITERIA, AgreementScore, OnMiss, uncertainty
from geep.modeling import GeepForSequenceClassification, family_of
from geep.predictor import ExitPrediction, ExitPredictor
from geep.scheduler import CostModel, Timings, budget_cuts, schedule

logger = logging.getLogger(__name__)

Integers = NDArray[np.int64]
TextInput = str | tuple[str, str]

TABLE_FILE = "exit_table.safetensors"
SETTINGS_FILE = "calibration.json"
RANGES_FILE = "activation_ranges.safetensors"

# Dtypes an engine may be asked for, and the dtype its model then has; which of them a backend runs, it says itself.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}


# --------------------------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExitSettings:
    """How certain is certain enough; learned by `geep profile` and `geep calibrate`, kept in `calibration.json`.

    Attributes:
        speed: FastBERT's knob in [0, 1]: an exit answers once its uncertainty is below it; 0 is the full model.
        criterion: Row of `CRITERIA`, or "agreement" (`AgreementScore`).
        temperatures: Divides the logits at each depth (0 is the lexical exit), so that scores mean the same everywhere.
        agreement: Score of each depth but the last, for the criterion "agreement"; empty where none were learned.
        on_miss: "continue": an answer at the predicted exit that is not certain enough goes on and is asked again.
            "stop" (the paper): it is final.
        quantile: Of a text's distribution over exits, the quantile that is its predicted layer. Low quantiles ask
            early and often (a check is cheap), high ones late (a stop is final).
        check_layers: Exits at which texts are asked; None: all. The full model answers whoever is left. Where a check
            costs as much as layers do (a GPU with small batches), few are best; fewer also err less often.
        lexical_exit: Whether texts may be answered by the table alone, without the encoder.
        certified_on: Backend, dtype and longest text (`Engine.deployed_as`) for which the speed was certified; an
            engine that runs otherwise says so, since exits differ.
    """

    speed: float = 0.0
    criterion: str = "entropy"
    temperatures: dict[int, float] = field(default_factory=dict)
    agreement: dict[int, AgreementScore] = field(default_factory=dict)
    on_miss: OnMiss = "continue"
    quantile: float = 0.5
    check_layers: tuple[int, ...] | None = None
    lexical_exit: bool = False
    certified_on: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.speed <= 1:
            raise ValueError(f"speed must lie in [0, 1], got {self.speed}.")
        if not isinstance(self.lexical_exit, bool):
            raise TypeError(f"lexical_exit must be true or false, got {self.lexical_exit!r}.")
        if self.criterion not in (*CRITERIA, AGREEMENT):
            raise ValueError(f"Unknown criterion {self.criterion!r}; known: {sorted((*CRITERIA, AGREEMENT))}.")
        if self.on_miss not in ("stop", "continue"):
            raise ValueError(f"on_miss must be 'stop' or 'continue', got {self.on_miss!r}.")
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must lie between 0 and 1, got {self.quantile}.")
        checks = self.check_layers
        if checks is not None and (list(checks) != sorted(set(checks)) or any(layer < 1 for layer in checks)):
            raise ValueError(f"check_layers must be layers from 1 up, in ascending order, got {checks}.")
        if any(not 0 < value < float("inf") for value in self.temperatures.values()):
            raise ValueError(f"temperatures must be positive and finite, got {self.temperatures}.")

    def temperature(self, depth: int) -> float:
        """Temperature at a depth; 1 where none was fitted."""
        return self.temperatures.get(depth, 1.0)

    def asked_layers(self, depths: tuple[int, ...]) -> Integers:
        """Return those of a model's depths at which texts are asked; the last, the full model, always is."""
        asked = depths if self.check_layers is None else (*self.check_layers, depths[-1])
        return np.asarray(asked, dtype=np.int64)

    def save(self, folder: str | Path, record: dict[str, Any] | None = None) -> None:
        """Write `calibration.json`, with what else is worth keeping of how the settings were found."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        values["temperatures"] = {str(depth): value for depth, value in self.temperatures.items()}
        values["agreement"] = {str(depth): astuple(score) for depth, score in self.agreement.items()}
        text = json.dumps({"settings": values, "record": record or {}}, indent=2, ensure_ascii=False)
        path = Path(folder) / SETTINGS_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, model: str | Path) -> ExitSettings:
        """Read the `calibration.json` of a folder or a model of the hub; defaults (the full model) where there is none.

        Raises:
            ValueError: If the file is damaged.
        """
        path = _file_of(model, SETTINGS_FILE)
        if path is None:
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))["settings"]
            values["temperatures"] = {int(depth): float(value) for depth, value in values["temperatures"].items()}
            scores = values.get("agreement", {}).items()  # absent from files written before there were any
            values["agreement"] = {int(depth): AgreementScore(*map(float, score)) for depth, score in scores}
            if values.get("check_layers") is not None:
                values["check_layers"] = tuple(map(int, values["check_layers"]))
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); run `geep calibrate` again, or delete it.") from error


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine runs. What it decides is in `ExitSettings`.

    Attributes:
        backend: Row of `BACKENDS`; None: packed (cuda on a GPU) where the encoder's family allows it, else padded.
        device: "cpu", "cuda", …; None: a GPU where there is one.
        dtype: Row of `DTYPES`; None: the backend's default, float32 on a CPU, bfloat16 on a GPU. "int8" multiplies in
            8 bits and keeps all else in float32.
        max_batch_tokens: Tokens of a staircase; None: what a short timing of the backend finds enough (`CostModel`).
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


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one text.

    Attributes:
        label: Name of the most likely label.
        score: Its probability.
        scores: Probability of every label; for multi-label models each on its own.
        exit_layer: Encoder layers that were run; 0: the table alone answered.
        predicted_layer: Layer at which the engine meant to ask first; None where nothing was predicted.
        truncated: Whether the text was cut at the longest length.
    """

    label: str
    score: float
    scores: dict[str, float]
    exit_layer: int
    predicted_layer: int | None
    truncated: bool


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Token ids of texts and which texts were cut, (num_texts,)."""

    batch: TokenBatch
    truncated: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RunResult:
    """Columns of a run, one row a text, in the caller's order.

    Attributes:
        logits: Logits over the temperature of the exit that answered, (num_texts, num_labels) float32, on the host.
        exit_layers: Encoder layers run, (num_texts,).
        predicted_layers: Layer at which each text was first asked, (num_texts,).
    """

    logits: Tensor
    exit_layers: Integers
    predicted_layers: Integers


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of texts before any encoder layer runs.

    Attributes:
        predicted_layers: Layer at which each text is asked first; 0: answered by the table, (num_texts,).
        lexical_logits: The table's guess at the label, (num_texts, num_labels); None where there is none.
    """

    predicted_layers: Integers
    lexical_logits: Tensor | None


# --------------------------------------------------------------------------------------------------------------------
# Engine
# --------------------------------------------------------------------------------------------------------------------


class Engine:
    """Classifies texts; see the module's docstring.

    Invariants: the result has one prediction for each text, in order; a text's answer does not depend on the texts
    beside it beyond the rounding of its dtype; an engine holds no state that a call could change, so calls may come
    from several threads.
    """

    def __init__(
        self,
        model: GeepForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        *,
        predictor: ExitPredictor | None = None,
        settings: ExitSettings | None = None,
        config: EngineConfig | None = None,
        identity: dict[str, str] | None = None,
        ranges: ActivationRanges | None = None,
    ) -> None:
        """Make an engine of parts in memory; `from_pretrained` makes one of a folder.

        Args:
            model: Taken over: moved to the device and cast to the dtype.
            tokenizer: Its tokenizer.
            predictor: Exit table of this very model and tokenizer.
            settings: When exits answer; None: the full model always does.
            config: How to run.
            identity: The `fingerprint` of model and tokenizer, where it is known already.
            ranges: Ranges of the model's activations, which the packed backend needs for int8.

        Raises:
            ValueError: If the weights hold NaN or infinity, or the device cannot run the dtype, or the backend cannot
                run the encoder, or the settings need a table that is not there.
        """
        self.config = EngineConfig() if config is None else config
        self.settings = ExitSettings() if settings is None else settings
        self.tokenizer = tokenizer
        self.predictor = predictor
        self.depths: tuple[int, ...] = model.config.depths
        self.multi_label: bool = model.config.problem_type == "multi_label_classification"
        names: dict[Any, str] = dict(model.config.id2label or {})
        self.label_names = tuple(names[i] for i in range(len(names)))
        self._check_table(self.settings)
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(
                    f"Weight {name!r} holds NaN or infinity, expected finite numbers; train or copy it again."
                )
        # Taken before the cast: a table made on a bfloat16 engine belongs to the float32 weights in the folder.
        self.identity = fingerprint(model, tokenizer) if identity is None else identity
        device = _device(self.config.device)
        name = self.config.backend or _default_backend(model.encoder.config.model_type, device)
        self.dtype = _dtype(self.config.dtype, name, device)
        self.model = nn.Module.to(model, device=device, dtype=DTYPES[self.dtype]).train(mode=False)
        # The table where it is asked: on a GPU, one kernel foretells a window's exit layers.
        self._planner = None if predictor is None else _on_device(predictor, device)
        self.max_length = _max_length(self.config.max_length, model, tokenizer)
        self.backend: Backend[Any] = _build_backend(name, self.model, self.dtype, ranges, self.config.compile)
        # Weights of fewer bits answer otherwise: a promise made with 8 does not cover them.
        weights = " with 7-bit weights" if self.dtype == "int8" and largest_weight() < 127 else ""
        self.deployed_as = f"{name}, {self.dtype}{weights}, at most {self.max_length} tokens"
        # The cost of a layer on this machine, and the tokens of a staircase that follow from it.
        self.cost = (
            measure_cost(self.backend, self.depths[0])
            if device.type == "cpu" and self.config.max_batch_tokens is None
            else None
        )
        self.max_batch_tokens = self.config.max_batch_tokens or _batch_tokens(self.cost)
        if self.settings.certified_on not in (None, self.deployed_as):
            logger.warning(
                "The speed was certified for [%s], this engine runs [%s]: the promise does not cover it. "
                "Run `geep profile` and `geep calibrate` as deployed.",
                self.settings.certified_on,
                self.deployed_as,
            )

    @classmethod
    def from_pretrained(cls, path: str | Path, *, speed: float | None = None, **config: Any) -> Engine:
        """Load a folder written by `geep train` (or `Engine.save_pretrained`), or such a model of the hub.

        Args:
            path: Folder or model id.
            speed: Overrides the calibrated speed.
            **config: Fields of `EngineConfig`.

        Raises:
            ValueError: If files of the folder are damaged or do not belong together.
            TypeError: If a keyword is no field of `EngineConfig`.
        """
        engine_config = EngineConfig(**config)
        model, tokenizer = load_model(path)
        settings = ExitSettings.load(path)
        identity, predictor = fingerprint(model, tokenizer), None
        table = _file_of(path, TABLE_FILE)
        if table is not None:
            predictor = ExitPredictor.load(table, fingerprint=identity)
        if speed is not None:
            settings = replace(settings, speed=speed)
        ranges_file = _file_of(path, RANGES_FILE) if engine_config.dtype == "int8" else None
        ranges = None if ranges_file is None else ActivationRanges.load(ranges_file, fingerprint=identity)
        return cls(
            model,
            tokenizer,
            predictor=predictor,
            settings=settings,
            config=engine_config,
            identity=identity,
            ranges=ranges,
        )

    def in_float32(self) -> Engine:
        """Return the engine in float32 on the same weights, without table: the reference of a quantised one.

        Raises:
            ValueError: If the engine has cast the weights, so that float32 is gone.
        """
        if self.model.dtype != torch.float32:
            raise ValueError(f"The weights were cast to {self.model.dtype}; load the model again in float32.")
        # The size of batches is taken over: a reference need not be timed.
        config = replace(self.config, backend=None, dtype="float32", max_batch_tokens=self.max_batch_tokens)
        return Engine(self.model, self.tokenizer, config=config, identity=self.identity)

    def save_pretrained(self, folder: str | Path, *, record: dict[str, Any] | None = None) -> None:
        """Write model, tokenizer, table and settings; `record` is kept in `calibration.json` beside the settings.

        Raises:
            ValueError: If the engine has cast the weights: rounded ones do not belong in a folder.
        """
        if self.model.dtype != torch.float32:
            raise ValueError(
                f"The engine runs in {self.model.dtype}, and rounded weights are not saved. Save model and tokenizer "
                "before making an engine of them, then write the table beside them with engine.save_exits(folder)."
            )
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.save_exits(folder, record=record)

    def save_exits(self, folder: str | Path, *, record: dict[str, Any] | None = None) -> None:
        """Write table and settings beside a model that is already in the folder; an older table does not stay."""
        table = Path(folder) / TABLE_FILE
        if self.predictor is None:
            table.unlink(missing_ok=True)
        else:
            self.predictor.save(table, fingerprint=self.identity)
        self.settings.save(folder, record)

    def replace(self, *, predictor: ExitPredictor | None = None, settings: ExitSettings | None = None) -> Engine:
        """Return an engine on the same weights with another table or other settings."""
        other = object.__new__(Engine)
        other.__dict__.update(self.__dict__)
        if predictor is not None:
            other.predictor, other._planner = predictor, _on_device(predictor, self.model.device)
        other.settings = self.settings if settings is None else settings
        other._check_table(other.settings)
        return other

    # ----------------------------------------------------------------------------------------------------------------
    # Texts in, predictions out
    # ----------------------------------------------------------------------------------------------------------------

    def predict(self, texts: Sequence[TextInput], *, speed: float | None = None) -> list[Prediction]:
        """Classify texts, or pairs of texts.

        Args:
            texts: Strings, or tuples of two strings. An empty list gives an empty list.
            speed: Overrides the engine's speed for this call.

        Returns:
            One prediction for each text, in the order of the texts.

        Raises:
            TypeError: If `texts` is one string, or an item is neither a string nor a pair of strings.
            ValueError: If a text holds half a character (a lone surrogate); the message names it.
            FloatingPointError: If a text's logits are not finite; the message names it.
        """
        settings = self.settings if speed is None else replace(self.settings, speed=speed)
        predictions: list[Prediction] = []
        # Tokenised and run part by part: memory does not grow with the number of texts.
        starts = range(0, len(_checked(texts)), _TEXTS_PER_CALL)
        parts = (texts[start : start + _TEXTS_PER_CALL] for start in starts)
        for start, tokens in zip(starts, self._tokenized_ahead(parts), strict=True):
            result = self.run_tokens(tokens.batch, settings=settings)
            self._check_finite(result, tokens.batch, settings, first=start)
            predictions += self._predictions(result, tokens.truncated)
        return predictions

    def _tokenized_ahead(self, parts: Iterable[Sequence[TextInput]]) -> Iterator[TokenizedTexts]:
        """Tokenise each part while the one before it runs; the tokenizer's Rust threads leave Python's lock alone."""
        with ThreadPoolExecutor(1, thread_name_prefix="geep-tokenize") as thread:
            waiting: Future[TokenizedTexts] | None = None
            for part in parts:
                following = thread.submit(self.tokenize, part)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()

    def tokenize(self, texts: Sequence[TextInput]) -> TokenizedTexts:
        """Turn texts into token ids, cut at the longest length; memory grows with the number of texts.

        Raises:
            TypeError, ValueError: As `predict`.
        """
        texts = _checked(texts)
        with_types = family_of(self.model.encoder.config).has_token_type_ids and any(
            not isinstance(text, str) for text in texts
        )
        encode = _encode if self.tokenizer.is_fast else _encode_slowly
        found = encode(self.tokenizer, texts, self.max_length)
        lengths = np.fromiter(map(len, found.ids), dtype=np.int64, count=len(texts))
        types = _flat(found.type_ids, lengths) if with_types else None
        return TokenizedTexts(TokenBatch(_flat(found.ids, lengths), types, lengths), found.truncated)

    def _check_finite(self, result: RunResult, batch: TokenBatch, settings: ExitSettings, *, first: int) -> None:
        broken = (~torch.isfinite(result.logits).all(-1)).nonzero().flatten().tolist()
        if not broken:
            return
        # A backend may run short texts in one block, in which NaN spreads. The text to name is broken alone, too.
        for row in broken:
            alone = self.run_tokens(batch.select(np.array([row])), settings=settings)
            if not torch.isfinite(alone.logits).all():
                break
        else:
            row = broken[0]
        raise FloatingPointError(
            f"Text {first + row} has logits that are not finite; nothing can be said of it. "
            f"If the dtype is {self.dtype}, try float32."
        )

    def _predictions(self, result: RunResult, truncated: NDArray[np.bool_]) -> list[Prediction]:
        logits = result.logits
        probabilities = torch.sigmoid(logits) if self.multi_label else torch.softmax(logits, dim=-1)
        best = probabilities.argmax(-1).tolist()
        known_layers = self.predictor is not None
        return [
            Prediction(
                label=self.label_names[label],
                score=row[label],
                scores=dict(zip(self.label_names, row, strict=True)),
                exit_layer=exit_layer,
                predicted_layer=predicted if known_layers else None,
                truncated=cut,
            )
            for label, row, exit_layer, predicted, cut in zip(
                best,
                probabilities.tolist(),
                result.exit_layers.tolist(),
                result.predicted_layers.tolist(),
                truncated.tolist(),
                strict=True,
            )
        ]

    # ----------------------------------------------------------------------------------------------------------------
    # Tokens in, logits out
    # ----------------------------------------------------------------------------------------------------------------

    def plan(self, batch: TokenBatch, *, settings: ExitSettings | None = None) -> Plan:
        """Say, before the run, at which layer each text is to be asked first.

        Without a table every text is asked at the first exit ("continue"), and speed 0 always runs all layers. Where
        only some exits are asked, it is the next of them.
        """
        settings = self.settings if settings is None else settings
        asked = settings.asked_layers(self.depths)
        if settings.speed == 0:
            return Plan(np.full(len(batch), self.depths[-1]), None)
        if self._planner is None:
            self._check_table(settings)
            return Plan(np.full(len(batch), asked[0]), None)
        return self.plan_from(self.foretell(batch, settings), batch.lengths, settings)

    def foretell(self, batch: TokenBatch, settings: ExitSettings) -> ExitPrediction:
        """Ask the table, which must be there; of the settings, only speed and quantile matter."""
        if self._planner is None:
            raise ValueError("There is no exit table to ask; run `geep profile` first.")
        place = self._planner.device
        return self._planner.predict(
            torch.from_numpy(batch.input_ids).to(place),
            torch.from_numpy(batch.lengths).to(place),
            speed=settings.speed,
            quantile=settings.quantile,
        )

    def plan_from(self, found: ExitPrediction, lengths: Integers, settings: ExitSettings) -> Plan:
        """Make a plan of what the table said of texts of these lengths."""
        asked = settings.asked_layers(self.depths)
        layers = asked[np.searchsorted(asked, found.exit_layers.cpu().numpy())]
        if found.lexical_logits is None:
            return Plan(layers, None)
        lexical = found.lexical_logits.cpu()
        if settings.lexical_exit:
            unsure = self.uncertainty(lexical, 0, settings)
            # Empty texts have no token to guess from.
            layers[(unsure < settings.speed).numpy() & (lengths > 0)] = 0
        return Plan(layers, lexical)

    def run_tokens(
        self, batch: TokenBatch, *, settings: ExitSettings | None = None, exit_layers: Integers | None = None
    ) -> RunResult:
        """Run tokenised texts: plan, schedule, staircases, pooled survivors.

        Args:
            batch: The texts.
            settings: Overrides the engine's settings.
            exit_layers: Layers that take the place of the prediction, each an exit or the full model, (num_texts,);
                the lexical exit is then left out.

        Raises:
            ValueError: If an exit layer has no exit.
        """
        settings = self.settings if settings is None else settings
        if exit_layers is None:
            plan = self.plan(batch, settings=settings)
        else:
            unknown = sorted(set(np.unique(exit_layers).tolist()) - set(self.depths))
            if unknown:
                raise ValueError(f"No exit at layers {unknown}; exits and the full model are at {list(self.depths)}.")
            # The table's guess is read where an exit's answer is judged, which "stop" never does.
            judged = settings.criterion == AGREEMENT and settings.on_miss == "continue"
            guess = self.plan(batch, settings=settings).lexical_logits if judged else None
            plan = Plan(np.asarray(exit_layers, dtype=np.int64), guess)
        run = _Run(self, settings, plan, len(batch))
        with torch.inference_mode():
            rows = run.answer_known()
            for start, stop in budget_cuts(batch.lengths[rows], max_tokens=self.config.window_tokens):
                run.window(batch, rows[start:stop])
            return run.result()

    def exit_logits(self, batch: TokenBatch, *, report: Callable[[float], None] = lambda _: None) -> Tensor:
        """Logits of every exit and of the full model, on the backend as deployed: (num_depths, num_texts, num_labels).

        What profiles, tables and calibrations are made of, so that they speak of the exits that will answer.

        Args:
            batch: The texts.
            report: Told the share that is done.
        """
        done, total = 0, max(len(batch.input_ids), 1)
        out = torch.empty(len(self.depths), len(batch), len(self.label_names))
        full = np.full(len(batch), self.depths[-1])
        with torch.inference_mode():
            for staircase in schedule(full, batch.lengths, max_batch_tokens=self.max_batch_tokens):
                live = self.backend.start(batch.select(staircase.indices))
                index = torch.from_numpy(staircase.indices)
                for layer in range(1, self.depths[-1] + 1):
                    live = self.backend.advance(live, layer, len(staircase.indices))
                    if layer in self.depths:
                        logits = self.backend.exit_logits(live, layer, 0, len(staircase.indices))
                        out[self.depths.index(layer), index] = logits.float().cpu()
                done += int(staircase.lengths.sum())
                report(done / total)
        return out

    def uncertainty(self, logits: Tensor, depth: int, settings: ExitSettings, lexical: Tensor | None = None) -> Tensor:
        """Uncertainty of logits (num_texts, num_labels) of the exit at a depth, (num_texts,).

        Args:
            logits: Of an exit other than the full model.
            depth: Layers run; 0 is the lexical exit.
            settings: The criterion and what it has learned.
            lexical: The table's logits of the same texts, where there are some; the criterion "agreement" reads them.
        """
        if settings.criterion == AGREEMENT:
            guess = None if depth == 0 else lexical
            return settings.agreement[depth].uncertainty(logits, guess, multi_label=self.multi_label)
        return uncertainty(
            logits, settings.criterion, temperature=settings.temperature(depth), multi_label=self.multi_label
        )

    def _check_table(self, settings: ExitSettings) -> None:
        needs = [
            name
            for name, needed in (
                ("on_miss='stop'", settings.on_miss == "stop" and settings.speed > 0),
                ("lexical_exit=True", settings.lexical_exit),
            )
            if needed
        ]
        unknown = sorted(set(settings.check_layers or ()) - set(self.depths[:-1]))
        if unknown:
            raise ValueError(f"check_layers names layers {unknown}, the model has exits at {list(self.depths[:-1])}.")
        if settings.criterion == AGREEMENT:
            missing = sorted(set(self.depths[:-1]) - set(settings.agreement))
            missing += [0] if settings.lexical_exit and 0 not in settings.agreement else []
            if missing:
                raise ValueError(
                    f"The criterion {AGREEMENT!r} has no scores for the exits at layers {missing}; run `geep profile`."
                )
        if self.predictor is None and needs:
            raise ValueError(f"{' and '.join(needs)} needs an exit table, found none; run `geep profile` first.")
        if self.predictor is not None and tuple(self.predictor.depths) != self.depths:
            raise ValueError(
                f"The exit table predicts layers {list(self.predictor.depths)}, the model has exits at "
                f"{list(self.depths)}; run `geep profile` again for this model."
            )


# Texts tokenised at once by `predict`. Large enough that sorting finds texts alike, small enough to bound memory.
_TEXTS_PER_CALL = 16_384


class _Run:
    """One run of texts through the engine: its columns, and the pools in which survivors wait."""

    def __init__(self, engine: Engine, settings: ExitSettings, plan: Plan, num_texts: int) -> None:
        self.engine, self.settings, self.plan = engine, settings, plan
        self.backend = engine.backend
        self.logits = torch.full((num_texts, len(engine.label_names)), torch.nan)
        self.waiting: list[tuple[Integers, Tensor]] = []
        self.exit_layers: Integers = np.zeros(num_texts, dtype=np.int64)
        self.pools: dict[int, list[tuple[Any, Integers]]] = {}

    def answer_known(self) -> Integers:
        """Answer the texts that need no encoder, and return the rows of the others."""
        layers, logits = self.plan.predicted_layers, self.plan.lexical_logits
        if logits is not None:
            known = np.flatnonzero(layers == 0)
            self._answer(known, logits[torch.from_numpy(known)], 0)
        return np.flatnonzero(layers > 0)

    def window(self, batch: TokenBatch, rows: Integers) -> None:
        """Run the texts at `rows`; afterwards no pool holds any."""
        layers = self.plan.predicted_layers[rows]
        budget = self.engine.max_batch_tokens
        for staircase in schedule(layers, batch.lengths[rows], max_batch_tokens=budget):
            texts = rows[staircase.indices]
            live = self.backend.start(batch.select(texts))
            for layer in range(1, int(staircase.exit_layers[0]) + 1):
                due = staircase.texts_at(layer + 1)
                continuing = due if self._is_final(layer) else None
                live = self.backend.advance(live, layer, staircase.texts_at(layer), continuing=continuing)
                if due < len(live.lengths):
                    self._ask(live, layer, due, texts)
        # Survivors of all staircases wait at the layer they have run. From the shallowest pool upwards they are packed
        # into full batches again and run to the next exit, so no batch shrinks as its texts leave.
        asked = self.settings.asked_layers(self.engine.depths)
        for layer in self.engine.depths[:-1]:
            following = int(asked[np.searchsorted(asked, layer, side="right")])
            for live, texts in self._merged(self.pools.pop(layer, []), budget):
                for step in range(layer + 1, following + 1):
                    continuing = 0 if self._is_final(step) else None
                    live = self.backend.advance(live, step, len(texts), continuing=continuing)
                self._ask(live, following, 0, texts)

    def _ask(self, live: Any, layer: int, start: int, texts: Integers) -> None:
        """Let the exit at `layer` answer the live texts from `start` on; those not certain enough go to the pool."""
        stop = len(live.lengths)
        asked = texts[start:stop]
        logits = self.backend.exit_logits(live, layer, start, stop).float()
        if self._is_final(layer):
            self._answer(asked, logits, layer)
            return
        # The one wait for the device: who is certain enough decides who goes on.
        logits = logits.cpu()
        unsure = self.engine.uncertainty(logits, layer, self.settings, self._guess(asked))
        sure = (unsure < self.settings.speed).numpy()
        hits, missed = np.flatnonzero(sure), np.flatnonzero(~sure)
        self._answer(asked[hits], logits[torch.from_numpy(hits)], layer)
        if len(missed):
            everyone = start == 0 and len(missed) == stop
            survivors = live if everyone else self.backend.select(live, start + missed)
            self.pools.setdefault(layer, []).append((survivors, asked[missed]))

    def _is_final(self, layer: int) -> bool:
        """Whether the texts that are asked at a layer end there, whatever the answer."""
        return self.settings.on_miss == "stop" or layer == self.engine.depths[-1]

    def _guess(self, texts: Integers) -> Tensor | None:
        """The table's logits of some texts, where the criterion reads them."""
        guess = self.plan.lexical_logits
        if guess is None or self.settings.criterion != AGREEMENT:
            return None
        return guess[torch.from_numpy(texts)]

    def _answer(self, texts: Integers, logits: Tensor, depth: int) -> None:
        if len(texts):
            self.exit_layers[texts] = depth
            scaled = logits / self.settings.temperature(depth)
            # What the device says stays there until the end: fetching it now would wait for it.
            if scaled.device.type == "cpu":
                self.logits[torch.from_numpy(texts)] = scaled
            else:
                self.waiting.append((texts, scaled))

    def _merged(self, pool: list[tuple[Any, Integers]], budget: int) -> list[tuple[Any, Integers]]:
        """Pack the pieces of a pool into as few batches as the budget allows."""
        if not pool:
            return []
        sizes = np.array([int(live.lengths.sum()) for live, _ in pool], dtype=np.int64)
        merged = []
        for start, stop in budget_cuts(sizes, max_tokens=budget):
            pieces = pool[start:stop]
            if len(pieces) == 1:
                merged.append(pieces[0])
                continue
            live = self.backend.concat([piece for piece, _ in pieces])
            texts = np.concatenate([texts for _, texts in pieces])
            by_length = np.argsort(live.lengths, kind="stable")
            merged.append((self.backend.select(live, by_length), texts[by_length]))
        return merged

    def result(self) -> RunResult:
        """Fetch what waits on the device, in one copy."""
        if self.waiting:
            texts = np.concatenate([texts for texts, _ in self.waiting])
            self.logits[torch.from_numpy(texts)] = torch.cat([logits for _, logits in self.waiting]).cpu()
        return RunResult(self.logits, self.exit_layers, self.plan.predicted_layers)


# --------------------------------------------------------------------------------------------------------------------
# Set-up
# --------------------------------------------------------------------------------------------------------------------


def load_model(path: str | Path) -> tuple[GeepForSequenceClassification, PreTrainedTokenizerBase]:
    """Load model (float32) and tokenizer of a folder or of the hub, whole or not at all.

    Raises:
        FileNotFoundError: If `path` is no folder and cannot be a name on the hub.
        ValueError: If the weights are damaged or do not cover the model.
    """
    name = str(path)
    if not Path(path).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"There is no model folder {name}; make one with `geep train`.")
    try:
        model, info = GeepForSequenceClassification.from_pretrained(
            str(path), dtype=torch.float32, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(f"The weights of {path} are damaged ({error}); copy or train the model again.") from error
    if info["missing_keys"]:
        raise ValueError(
            f"The weights of {path} lack {len(info['missing_keys'])} tensors, such as {min(info['missing_keys'])!r}; "
            "the file belongs to another model or was cut. Copy or train the model again."
        )
    return model, AutoTokenizer.from_pretrained(str(path))


def _file_of(model: str | Path, name: str) -> Path | None:
    """Path of a file that a model folder, or a model of the hub, may have."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.exists() else None
    try:
        found = cached_file(str(model), name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        logger.warning("%s of %s cannot be had (%s); going on as if the model had none.", name, model, error)
        return None
    return None if found is None else Path(found)


def fingerprint(model: GeepForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digest model and tokenizer, so that a table made with others is refused.

    The model's digest covers every parameter's name, shape and float32 bytes, so it does not depend on how the weights
    were stored.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    words = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return {"model": digest.hexdigest(), "tokenizer": hashlib.sha256(words.encode()).hexdigest()}


def _on_device(predictor: ExitPredictor, device: torch.device) -> ExitPredictor:
    return predictor.to(device) if device.type == "cuda" else predictor


def _default_backend(model_type: str, device: torch.device) -> str:
    names = ("cuda", *BACKENDS) if device.type == "cuda" else BACKENDS
    return next(name for name in names if BACKENDS[name].supports(model_type))


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


# Sizes of the batches that are timed: around the one where a layer's fixed cost fades on a CPU. Texts of 32 tokens.
_TIMED_TEXTS, _TIMED_LENGTH = (2, 8, 32), 32

# Bounds on the fitted staircase. Below, a staircase's upper layers are too small; above, nothing is gained.
_LEAST_BATCH_TOKENS, _MOST_BATCH_TOKENS = 1024, 8192


def measure_cost(backend: Backend[Any], depth: int) -> CostModel:
    """Time the first layer and the exit at `depth` on a few small batches of a CPU, well below a second.

    The best of three calls counts, since other programs only ever add time.
    """
    layers, checks = [], []
    with torch.inference_mode():
        for count in _TIMED_TEXTS:
            lengths = np.full(count, _TIMED_LENGTH)
            live = backend.start(TokenBatch(np.zeros(int(lengths.sum()), dtype=np.int64), None, lengths))
            layers.append(_seconds(partial(backend.advance, live, 1, count)))
            checks.append(_seconds(partial(_check, backend, live, depth, count)))
    tokens = tuple(count * _TIMED_LENGTH for count in _TIMED_TEXTS)
    return CostModel.fit(Timings(tokens, tuple(layers)), Timings(_TIMED_TEXTS, tuple(checks)))


def _check(backend: Backend[Any], live: Any, depth: int, count: int) -> Any:
    """What asking an exit takes: its classifier, and picking those that go on."""
    sure = backend.exit_logits(live, depth, 0, count).softmax(-1).amax(-1) > 2
    return backend.select(live, np.flatnonzero(~sure.numpy()))


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of the best of three calls, after one that does not count."""
    work()
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def _batch_tokens(cost: CostModel | None) -> int:
    """Tokens of a staircase: enough that a layer's fixed cost fades even where most texts have left."""
    if cost is None:
        # Eight times 5,632, where BERT-base's matrix products fill the 132 processors of an H100 evenly (arithmetic,
        # not yet measured): staircases taper, and their upper layers should be worth a launch, too.
        return 45_056
    fitted = -(-cost.batch_tokens(waste=0.01) // 128) * 128
    return min(max(fitted, _LEAST_BATCH_TOKENS), _MOST_BATCH_TOKENS)


def _device(asked: str | None) -> torch.device:
    if asked is None:
        found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info("Running on %s.", found)
        return found
    device = torch.device(asked)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={asked!r} was asked for, but torch finds no CUDA device; use device='cpu'.")
    return device


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
    if device.type == "cpu" and asked == "bfloat16" and not torch.cpu._is_avx512_bf16_supported():
        raise ValueError("This CPU has no AVX-512 BF16, on others bfloat16 is slower than float32; use float32.")
    return asked


def _max_length(asked: int | None, model: GeepForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest text in tokens: the least of the user's, the tokenizer's and the position table's limits."""
    config = model.encoder.config
    positions = config.max_position_embeddings
    if family_of(config).positions_after_pad:
        positions -= config.pad_token_id + 1
    limits = [positions, tokenizer.model_max_length, *([] if asked is None else [asked])]
    return int(min(limits))


def _checked(texts: Sequence[TextInput]) -> Sequence[TextInput]:
    if isinstance(texts, str):
        raise TypeError("Expected a list of texts, got one string; write predict([text]).")
    for index, text in enumerate(texts):
        parts = (text,) if isinstance(text, str) else text
        if parts is text and not (
            isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(part, str) for part in text)
        ):
            raise TypeError(f"Text {index} is {type(text).__name__}; expected a string or a pair of strings.")
        if not all(part.isascii() or _is_unicode(part) for part in parts):
            raise ValueError(
                f"Text {index} holds half a character (a lone surrogate), expected Unicode; replace it, for example by "
                "text.encode('utf-8', 'replace').decode()."
            )
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Token ids and segment ids of each text, and which were cut."""

    ids: Sequence[Sequence[int]]
    type_ids: Sequence[Sequence[int]]
    truncated: NDArray[np.bool_]


def _encode(tokenizer: Any, texts: Sequence[TextInput], max_length: int) -> _Encoded:
    """Tokenise in Rust, texts and pairs together, and no more than is asked for: no offsets, masks or words."""
    tokenizer.set_truncation_and_padding(
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.LONGEST_FIRST,
        max_length=max_length,
        stride=0,
        pad_to_multiple_of=None,
        padding_side=None,
    )
    rows = tokenizer.backend_tokenizer.encode_batch_fast(list(texts))
    # Built as lists at once: each look at an encoding's ids makes a new list.
    ids = [row.ids for row in rows]
    cut = (len(row) >= max_length and bool(row.overflowing) for row in rows)
    types = [row.type_ids for row in rows] if any(not isinstance(text, str) for text in texts) else []
    return _Encoded(ids, types, np.fromiter(cut, dtype=bool, count=len(rows)))


def _encode_slowly(tokenizer: Any, texts: Sequence[TextInput], max_length: int) -> _Encoded:
    """Tokenise with a tokenizer that is written in Python: a text at a time, as it would itself."""

    def encode(text: TextInput, **options: Any) -> tuple[list[int], list[int]]:
        # In lists, for a single empty second text would count as none.
        parts = [[part] for part in ((text,) if isinstance(text, str) else text)]
        row = tokenizer(*parts, return_token_type_ids=True, verbose=False, **options)
        return row["input_ids"][0], row["token_type_ids"][0]

    rows = [encode(text) for text in texts]
    cut = np.fromiter((len(ids) > max_length for ids, _ in rows), dtype=bool, count=len(rows))
    for number in np.flatnonzero(cut).tolist():
        rows[number] = encode(texts[number], truncation=True, max_length=max_length)
    return _Encoded([ids for ids, _ in rows], [types for _, types in rows], cut)


def _ints(values: Sequence[int]) -> Integers:
    return np.asarray(values, dtype=np.int64)


def _flat(rows: Sequence[Sequence[int]], lengths: Integers) -> Integers:
    return np.fromiter((token for row in rows for token in row), dtype=np.int64, count=int(lengths.sum()))
