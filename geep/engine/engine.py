"""The engine: texts in, predictions out, in the caller's order.

Life of a text: token ids → lexical exit, or predicted exit layer → staircase → exit → prediction. There is one way
through, `Engine.run_tokens`; Python callers, files and evaluation all take it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from geep.backends import TokenBatch
from geep.backends.int8 import ActivationRanges
from geep.engine.certificate import Certificate
from geep.engine.cost import measure_cost
from geep.engine.deployment import Deployment, EngineConfig, EngineOptions, load_model
from geep.engine.planning import Plan, Planner
from geep.engine.predictions import Prediction, Predictions
from geep.engine.run import Course, RunResult
from geep.engine.settings import ExitSettings
from geep.engine.stored import StoredExits
from geep.engine.tokens import TextEncoder, TextInput, TokenizedTexts, check_texts, in_parts, tokenized_ahead
from geep.folder import HubOptions, UploadOptions, fingerprint, reachable, upload
from geep.modeling import GeepForSequenceClassification, family_of, label_names_of
from geep.predictor import ExitPredictor
from geep.progress import Progress, no_progress
from geep.scheduler import CostModel

Integers = NDArray[np.int64]
logger = logging.getLogger(__name__)


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
        certificate: Certificate | None = None,
    ) -> None:
        """Make an engine of parts in memory; `from_pretrained` makes one of a folder.

        Args:
            model: Taken over: moved to the device and, where the backend wants that, cast to the dtype.
            tokenizer: Its tokenizer.
            predictor: Exit table of this very model and tokenizer.
            settings: When exits answer; None: the full model always does.
            config: How to run.
            identity: The `fingerprint` of model and tokenizer, where it is known already.
            ranges: Ranges of the model's activations, which the packed backend needs for int8.
            certificate: What was certified of such an engine.

        Raises:
            ValueError: If the weights hold NaN or infinity, or the device cannot run the dtype, or the backend cannot
                run the encoder, or the settings need a table that is not there.
        """
        self.config = EngineConfig() if config is None else config
        self.settings = ExitSettings() if settings is None else settings
        self.tokenizer = tokenizer
        self.predictor = predictor
        self.ranges, self._certificate = ranges, certificate
        self.depths: tuple[int, ...] = model.config.depths
        self.multi_label: bool = model.config.problem_type == "multi_label_classification"
        self.label_names = label_names_of(model.config)
        self.text_pairs: bool | None = model.config.text_pairs
        self._check(self.settings)
        # Taken before a cast: a table made on a bfloat16 engine belongs to the float32 weights in the folder.
        self.identity = fingerprint(model, tokenizer) if identity is None else identity
        self.deployment = Deployment.of(model, tokenizer, self.config, ranges)
        encoder = model.encoder.config
        self._encode = TextEncoder.of(
            tokenizer,
            max_length=self.deployment.max_length,
            num_segments=encoder.type_vocab_size if family_of(encoder).has_token_type_ids else 0,
        )
        self.planner = self._plan_with(predictor)
        self.course = Course(
            backend=self.deployment.backend,
            depths=self.depths,
            num_labels=len(self.label_names),
            multi_label=self.multi_label,
            max_batch_tokens=self.deployment.max_batch_tokens,
            window_tokens=self.config.window_tokens,
        )

    @property
    def model(self) -> GeepForSequenceClassification:
        """The model, on its device and in its dtype."""
        return self.deployment.model

    @property
    def certificate(self) -> Certificate | None:
        """What is promised of this very engine; None where nothing is, or anything is otherwise than when certified."""
        known, rounded = self._certificate, self.deployment.is_rounded
        is_void = known is None or known.differences(self.made_with) or (rounded and known.reference != "float32")
        return None if is_void else known  # rounded engines were once held against themselves

    @property
    def made_with(self) -> dict[str, str | int | float | None]:
        """All that answers depend on, beyond rounding: what a certificate is bound to."""
        return {
            **self.identity,
            "table": None if self.predictor is None else self.predictor.digest,
            "ranges": None if self.ranges is None else self.ranges.digest,
            "speed": self.settings.speed,
            "settings": self.settings.digest,
            **self.deployment.made_with,
        }

    @property
    def answered_by(self) -> dict[str, str | int | float | None]:
        """All that answers depend on, to the last digit: what a file of answers is bound to."""
        sizes = {"max_batch_tokens": self.deployment.max_batch_tokens, "window_tokens": self.config.window_tokens}
        return {**self.made_with, **sizes}

    def measure_cost(self) -> CostModel:
        """Time a layer and an exit on this machine, well below a second.

        Raises:
            ValueError: If the engine does not run on a CPU.
        """
        return measure_cost(self.deployment.backend, self.depths[0], device=self.model.device.type)

    # ----------------------------------------------------------------------------------------------------------------
    # Load and save
    # ----------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        speed: float | None = None,
        exits: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **config: Unpack[EngineOptions],
    ) -> Engine:
        """Load a folder written by `geep train` (or `Engine.save_pretrained`), or such a model of the hub.

        It runs as it was certified, unless a dtype or backend is named; where nothing is certified of its exits, in
        float32 on a CPU.

        Args:
            path: Folder or model id.
            speed: Overrides the calibrated speed.
            exits: Whether to read table, settings and certificate; without them every text runs all layers.
            revision: Of a model of the hub: branch, tag or commit; None: the default branch.
            token: Access token, or True for the stored one; None: the stored one where needed.
            cache_dir: Where downloads are kept; None: the hub's cache.
            local_files_only: Whether to use what is in the cache already and ask no network.
            **config: Fields of `EngineConfig`: backend, device, dtype, max_batch_tokens, window_tokens, max_length,
                compile.

        Raises:
            FileNotFoundError: If `path` is no folder and cannot be a name on the hub.
            OSError: If the hub has no such model, or cannot be reached.
            ValueError: If files of the folder are damaged or do not belong together.
            TypeError: If a keyword is no field of `EngineConfig`.
        """
        engine_config = EngineConfig(**config)
        hub = reachable(path, HubOptions(revision, token, cache_dir, local_files_only))
        model, tokenizer = load_model(path, hub)
        identity = fingerprint(model, tokenizer)
        found = StoredExits.load(path, hub, fingerprint=identity, exits=exits, dtype=engine_config.dtype)
        made_with = None if found.certificate is None else found.certificate.made_with
        engine_config = engine_config.as_certified(made_with, is_uncertified=found.is_uncertified)
        engine = cls(
            model,
            tokenizer,
            predictor=found.predictor,
            settings=found.settings,
            config=engine_config,
            identity=identity,
            ranges=found.ranges,
            certificate=found.certificate,
        )
        if found.certificate is not None and engine.certificate is None:
            logger.warning(
                "What %s was certified for does not cover this engine, which has %s. Run `geep profile` and "
                "`geep calibrate` as deployed.",
                path,
                ", ".join(found.certificate.differences(engine.made_with)),
            )
        # Who names a speed knows that it is not the certified one.
        return engine if speed is None else engine.replace(settings=replace(engine.settings, speed=speed))

    def in_float32(self) -> Engine:
        """Return the engine in float32 on the same weights, without table: the reference of a rounded one.

        Raises:
            ValueError: If the engine has cast the weights, so that float32 is gone.
        """
        if self.model.dtype != torch.float32:
            raise ValueError(f"The weights were cast to {self.model.dtype}; load the model again in float32.")
        config = replace(self.config, backend=None, dtype="float32", max_batch_tokens=self.deployment.max_batch_tokens)
        return Engine(self.model, self.tokenizer, config=config, identity=self.identity)

    def save_pretrained(self, folder: str | Path, *, record: Mapping[str, Any] | None = None) -> None:
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

    def save_exits(self, folder: str | Path, *, record: Mapping[str, Any] | None = None) -> None:
        """Write table, settings, int8 ranges and certificate beside a model that is in the folder: all or nothing.

        An older table does not stay.
        """
        exits = StoredExits(self.predictor, self.settings, self.ranges, self.certificate)
        exits.save(folder, fingerprint=self.identity, record=record)

    def push_to_hub(self, repo_id: str, **options: Unpack[UploadOptions]) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub and return the address of the commit.

        Args:
            repo_id: ``user/name``; made if it does not exist.
            **options: Fields of `UploadOptions`: token, private, revision, commit_message.

        Raises:
            ValueError: As `save_pretrained`.
        """
        with tempfile.TemporaryDirectory(prefix="geep-") as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, **options)

    def replace(
        self,
        *,
        predictor: ExitPredictor | None = None,
        settings: ExitSettings | None = None,
        certificate: Certificate | None = None,
    ) -> Engine:
        """Return an engine on the same weights with another table, other settings or what was certified of it."""
        other = object.__new__(Engine)
        other.__dict__.update(self.__dict__)
        if predictor is not None:
            other.predictor, other.planner = predictor, self._plan_with(predictor)
        other.settings = self.settings if settings is None else settings
        if certificate is not None:
            other._certificate = certificate
        other._check(other.settings)
        return other

    # ----------------------------------------------------------------------------------------------------------------
    # Texts in, predictions out
    # ----------------------------------------------------------------------------------------------------------------

    def predict(
        self,
        texts: Iterable[TextInput],
        *,
        speed: float | None = None,
        top_k: int | None = None,
        threshold: float = Predictions.threshold,
    ) -> list[Prediction]:
        """Classify texts, or pairs of texts.

        Args:
            texts: Strings, or tuples of two strings, in a list or any other iterable. None gives an empty list.
            speed: Overrides the engine's speed for this call.
            top_k: Labels in `Prediction.scores`, most likely first; None: all, in the model's order.
            threshold: Probability from which a label of a multi-label model is in `Prediction.labels`.

        Returns:
            One prediction for each text, in the order of the texts.

        Raises:
            TypeError: If `texts` is one string, or an item is neither a string nor a pair of strings.
            ValueError: If a text holds half a character (a lone surrogate); the message names it. If an option is out
                of range.
            FloatingPointError: If a text's logits are not finite; the message names it.
        """
        return list(self.predict_columns(texts, speed=speed, top_k=top_k, threshold=threshold))

    def predict_columns(
        self,
        texts: Iterable[TextInput],
        *,
        speed: float | None = None,
        top_k: int | None = None,
        threshold: float = Predictions.threshold,
        keep_broken: bool = False,
    ) -> Predictions:
        """Classify texts as `predict` does, and answer in columns: arrays of labels, scores and exit layers.

        `keep_broken`: a text whose logits are not finite is no error; it has NaN probabilities (`is_finite`).
        """
        options: dict[str, Any] = {"top_k": top_k, "threshold": threshold, "keep_broken": keep_broken}
        if not (parts := list(self.predict_stream(texts, speed=speed, **options))):
            nothing = self.tokenize([])
            parts = [self._predictions(self.run_tokens(nothing.batch), nothing, top_k, threshold)]
        return Predictions.join(parts)

    def predict_stream(
        self,
        texts: Iterable[TextInput],
        *,
        speed: float | None = None,
        top_k: int | None = None,
        threshold: float = Predictions.threshold,
        keep_broken: bool = False,
    ) -> Iterator[Predictions]:
        """Classify texts as `predict_columns` does, a part at a time, in memory that does not grow with their number.

        Texts are taken from the iterable as they are needed, a part ahead of the run.
        """
        settings = self.settings if speed is None else replace(self.settings, speed=speed)
        start = 0
        parts = in_parts(texts, self.text_pairs, self.model.device.type)
        for tokens in tokenized_ahead(parts, self._encode):
            result = self._answered(tokens.batch, settings, first=start, keep_broken=keep_broken)
            yield self._predictions(result, tokens, top_k, threshold)
            start += len(tokens.batch)

    def tokenize(self, texts: Sequence[TextInput]) -> TokenizedTexts:
        """Turn texts into token ids, cut at the longest length; memory grows with the number of texts.

        Raises:
            TypeError, ValueError: As `predict`.
        """
        if isinstance(texts, str):
            raise TypeError("Expected a list of texts, got one string; write tokenize([text]).")
        check_texts(texts, pairs=self.text_pairs)
        return self._encode(texts)

    def _answered(self, batch: TokenBatch, settings: ExitSettings, *, first: int, keep_broken: bool) -> RunResult:
        """Run texts; logits that are not finite stay where they are wanted, else they are an error."""
        result = self.run_tokens(batch, settings=settings)
        broken = (~torch.isfinite(result.logits).all(-1)).nonzero().flatten().tolist()
        # A backend may run short texts in one block, in which NaN spreads. The texts to blame are broken alone, too.
        for row in broken:
            alone = self.run_tokens(batch.select(np.array([row])), settings=settings)
            if torch.isfinite(alone.logits).all():
                result.logits[row], result.exit_layers[row] = alone.logits[0], alone.exit_layers[0]
            elif keep_broken:
                result.logits[row] = torch.nan
            else:
                raise FloatingPointError(
                    f"Text {first + row} has logits that are not finite; nothing can be said of it. "
                    + self.deployment.advice_on_overflow
                )
        return result

    def _predictions(
        self, result: RunResult, tokens: TokenizedTexts, top_k: int | None, threshold: float
    ) -> Predictions:
        return Predictions.of_logits(
            result.logits,
            multi_label=self.multi_label,
            label_names=self.label_names,
            exit_layers=result.exit_layers,
            predicted_layers=None if self.predictor is None else result.predicted_layers,
            truncated=tokens.truncated,
            unknown_shares=self.planner.unknown_shares(tokens.batch),
            threshold=threshold,
            top_k=top_k,
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Tokens in, logits out
    # ----------------------------------------------------------------------------------------------------------------

    def plan(self, batch: TokenBatch, *, settings: ExitSettings | None = None) -> Plan:
        """Say, before the run, at which layer each text is to be asked first; see `Planner.plan`."""
        return self.planner.plan(batch, self.settings if settings is None else settings)

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
            plan = self.planner.plan(batch, settings)
        else:
            unknown = sorted(set(np.unique(exit_layers).tolist()) - set(self.depths))
            if unknown:
                raise ValueError(f"No exit at layers {unknown}; exits and the full model are at {list(self.depths)}.")
            # The table's guess is read where it is part of an answer, or where one is judged, which "stop" never does.
            read = bool(settings.fusing) or (settings.reads_table and settings.on_miss == "continue")
            guess = self.planner.plan(batch, settings).lexical_logits if read else None
            plan = Plan(np.asarray(exit_layers, dtype=np.int64), guess)
        return self.course.run(batch, plan, settings)

    def exit_logits(self, batch: TokenBatch, *, what: str = "all exits", progress: Progress = no_progress) -> Tensor:
        """Logits of every exit and of the full model, on the backend as deployed: (num_depths, num_texts, num_labels).

        What profiles, tables and calibrations are made of, so that they speak of the exits that will answer.

        Args:
            batch: The texts.
            what: Name of the work for `progress`.
            progress: Told how many tokens are done.
        """
        return self.course.exit_logits(batch, what=what, progress=progress)

    def _plan_with(self, predictor: ExitPredictor | None) -> Planner:
        return Planner.of(
            predictor,
            device=self.model.device,
            depths=self.depths,
            multi_label=self.multi_label,
            unk_token_id=self.tokenizer.unk_token_id,
        )

    def _check(self, settings: ExitSettings) -> None:
        settings.check(self.depths, None if self.predictor is None else tuple(self.predictor.depths))
