"""`train`: from labelled rows and the name of an encoder to a finished model folder with exits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from geep.acceleration.fitting import WORK, fit_exits, save_with_exits
from geep.data import DataPlan, Parts, fetch_encoder
from geep.data.splits import subset
from geep.distilling import FitSettings, check_kind
from geep.engine import Engine
from geep.folder import HubOptions, Provenance
from geep.progress import Progress, no_progress
from geep.training import TrainResult, TrainSettings, fine_tune, finished, request_of, result_of

_DEFAULT_SETTINGS = TrainSettings()
_DEFAULT_FITTING = FitSettings()

# Rows that say when to stop fitting: the share that an exit answers otherwise is known well on so many.
_MOST_ROWS_TO_CHOOSE_ON = 4000

_FINE_TUNED = "fine-tuned"


def train(
    parts: Parts,
    output: str | Path,
    *,
    encoder: str = "all-minilm-l6-v2",
    settings: TrainSettings = _DEFAULT_SETTINGS,
    head: str = "mean",
    exit_head: str = "conv",
    fitting: FitSettings = _DEFAULT_FITTING,
    exit_layers: Sequence[int] | None = None,
    plan: DataPlan | None = None,
    device: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Progress = no_progress,
) -> TrainResult:
    """Fine-tune a pretrained encoder, fit exits to its answers and write a model folder.

    The stages of the recipe come first; the default one is plain fine-tuning. Then, unless the recipe trains exits and
    no others are asked for, exits of all depths are fitted to the full model's own answers, which does not move, on the
    training rows and on further texts without labels. `profile` and `calibrate` come next.

    The full model's weights are those of the epoch that is best on the rows for profiling (some thousands of them),
    where these have labels; the same rows say when to stop fitting. Interrupted at any point, the same call goes on; on
    a finished folder it trains nothing and returns what was found then.

    Args:
        parts: The rows, divided; exits are fitted on `Parts.unlabelled`, too.
        output: Folder of the model: weights, tokenizer, `training.json`, which is written last.
        encoder: A name in `ENCODERS`, a folder or a hub id.
        settings: How to train; `TrainSettings.fits_exits` says whether exits are fitted.
        head: Row of `HEADS`: the full model's, and that of exits which the recipe trains.
        exit_head: Row of `HEADS`, of exits that are fitted.
        fitting: How exits are fitted.
        exit_layers: Layers with an exit. None: all but the last two.
        plan: Where the parts came from, noted for those who need the same rows again. None: they must have the parts.
        device: "cpu" keeps training off a GPU; None: what there is.
        revision: Branch, tag or commit of an encoder from the hub.
        token: Access token of the hub, or True for the stored one.
        cache_dir: Folder for what is fetched. None: that of the hub, or of `fetch_encoder`.
        local_files_only: Whether to ask no network for an encoder.
        progress: Told the texts tokenised, the steps of each stage, and what fitting has done.

    Returns:
        Steps, seconds, logs, how good the full model is on the rows for profiling, and how often fitted exits answer
        as it does.

    Raises:
        ValueError: If the training rows have no labels, or the folder holds another model, or the recipe trains exits
            and there are none, or there are texts without labels and no exits to fit on them, or no rows that say when
            to stop.
        FetchError: If fetching fails.
    """
    folder, work = Path(output), Path(output) / WORK
    source = fetch_encoder(encoder, cache_dir=cache_dir, local_files_only=local_files_only)
    asked: dict[str, Any] = {"exit_layers": exit_layers, "plan": plan}
    how: dict[str, Any] = {
        **asked,
        "encoder": source,
        "settings": settings,
        "head": head,
        "device": device,
        "hub": HubOptions(revision, token, cache_dir, local_files_only),
        "progress": progress,
    }
    if not settings.fits_exits:
        if parts.unlabelled is not None:
            raise ValueError(
                f"There are {len(parts.unlabelled)} texts without labels, but recipe {settings.recipe!r} fits no exits "
                "on them; leave them out, or set fit_exits (--fit-exits)."
            )
        return fine_tune(parts, folder, **how)
    check_kind(exit_head)
    if not len(parts.profile):
        raise ValueError("There are no rows for profiling, which say when to stop fitting exits; hold some out.")
    fitted_as: dict[str, Any] = {"exit_head": exit_head, "fitting": asdict(fitting)}
    about = request_of(parts, source, settings, head, **asked, revision=revision, **fitted_as)
    before = finished(folder, about, fitting=asdict(_DEFAULT_FITTING))
    if before is not None:
        shutil.rmtree(work, ignore_errors=True)
        return before
    tuned = fine_tune(parts, work / _FINE_TUNED, **how)
    # Of several processes, each on a GPU, one fits and writes; the others wait for a folder that is whole.
    processes = PartialState()
    if processes.is_main_process:
        begin = time.perf_counter()
        # Uncompiled: it passes over the texts once.
        full = Engine.from_pretrained(work / _FINE_TUNED, exits=False, device=device, dtype="float32", compile=False)
        fitted = fit_exits(
            full,
            parts.teaching,
            subset(parts.profile, _MOST_ROWS_TO_CHOOSE_ON, settings.seed),
            work,
            head=exit_head,
            exit_layers=exit_layers,
            settings=fitting,
            progress=progress,
        )
        save_with_exits(full, fitted.heads, folder)
        agreements = dict(zip(map(str, fitted.heads.depths), fitted.agreements, strict=True))
        learned = Provenance.read(work / _FINE_TUNED)
        result = {
            **learned.result,
            "seconds": round(tuned.seconds + time.perf_counter() - begin, 1),
            "exit_agreements": agreements,
            "exit_losses": dict(zip(agreements, fitted.heads.losses, strict=True)),
            "num_fitted": len(fitted.seen),
        }
        Provenance(about, result, learned.logs).write(folder)
        shutil.rmtree(work)
    processes.wait_for_everyone()
    return result_of(Provenance.read(folder), was_finished=False)
