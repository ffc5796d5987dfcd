"""What all rivals are made of: the same texts and the same weights, in forms that each of them can read.

`plain/` is an ordinary BertForSequenceClassification with the encoder's weights. geep's `mean` head averages the tokens
where BERT's classifier takes the first one, so such a model costs the same and answers otherwise: its time is compared,
its accuracy is not. `full.ts` is a TorchScript trace of the whole model, head included; ONNX graphs are made from it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rivals.worker import Job
from transformers import BertForSequenceClassification

from geep.data import load_dataset
from geep.engine import load_model
from geep.training import parts_of

CALIBRATION_TEXTS = 300


@dataclass(frozen=True, slots=True)
class Materials:
    """What `prepare` found and made.

    Attributes:
        job: What every worker is told.
        job_file: Where that is written.
        plain: Why there is no plain folder; None: there is one.
        not_comparable: Why the plain folder's answers say nothing about accuracy; None: they do.
        head: Row of geep's `HEADS`, the full model's.
    """

    job: Job
    job_file: Path
    plain: str | None
    not_comparable: str | None
    head: str


def prepare(
    data: str, data_dir: Path | None, model_dir: Path, cache: Path, *, max_texts: int, threads: int
) -> Materials:
    """Draw the texts and export the model; an export that is there already is kept.

    Raises:
        ValueError: If the data set is of pairs, has several labels a text, or has no test split.
    """
    dataset = load_dataset(data, data_dir=data_dir)
    if dataset.test is None:
        raise ValueError(f"Data set {data} has no test split; there is nothing to time on.")
    if dataset.multi_label or dataset.test.text_pairs is not None:
        raise ValueError(f"Data set {data} has pairs of texts or several labels a text; the rivals take neither.")
    model, tokenizer = load_model(model_dir)
    model.train(mode=False)
    digest = hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()[:16]
    export_dir = cache / digest
    export_dir.mkdir(parents=True, exist_ok=True)
    _trace(model, export_dir / "full.ts")
    why_not = _plain(model, tokenizer, export_dir / "plain")
    names = [model.config.id2label[i] for i in range(len(model.config.id2label))]
    random = np.random.default_rng(0)
    chosen = random.permutation(len(dataset.test))[:max_texts]
    test = dataset.test.select(chosen)
    calibration = random.permutation(len(dataset.train))[:CALIBRATION_TEXTS]
    labels = None if test.labels is None else [names.index(dataset.label_names[int(i)]) for i in test.labels]
    job = Job(
        texts=test.texts,
        labels=labels,
        calibration_texts=dataset.train.select(calibration).texts,
        label_names=names,
        export_dir=str(export_dir.resolve()),
        model_dir=str(model_dir.resolve()),
        max_length=int(tokenizer.model_max_length),
        threads=threads,
        **_labelled(model_dir),
    )
    job_file = cache / f"job-{data}-{digest}.json"
    job.save(job_file)
    return Materials(
        job=job,
        job_file=job_file,
        plain=why_not,
        not_comparable=None
        if _head_of(model) == "cls"
        else f"the {_head_of(model)} head is replaced by BERT's first-token classifier, of the same cost",
        head=_head_of(model),
    )


def _labelled(model_dir: Path) -> dict[str, Any]:
    """All rows with labels that a folder was made of: who trains another classifier has them as well."""
    _, parts = parts_of(model_dir)
    rows = [part for part in (parts.train, parts.profile, parts.calibration) if part.labels is not None]
    return {
        "labelled_texts": [text for part in rows for text in part.texts],
        "labelled": [int(label) for part in rows for label in part.labels],
    }


def _head_of(model: Any) -> str:
    """The full model's head; that of fitted exits is another."""
    return str(model.config.teacher_head or model.config.exit_head)


class _LogitsAlone(torch.nn.Module):
    """The full model as a function of ids and mask."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask).logits


def _trace(model: Any, path: Path) -> None:
    if path.exists():
        return
    # With padding in the example, so that the mask's code is on the traced path.
    ids = torch.full((2, 8), 3, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        traced = torch.jit.trace(_LogitsAlone(model), (ids, mask))
    partial = path.with_name("partial-full.ts")
    torch.jit.save(traced, partial)
    partial.rename(path)


def _plain(model: Any, tokenizer: Any, folder: Path) -> str | None:
    """Write the plain folder; the reason, where the model cannot be one."""
    head = _head_of(model)
    if model.encoder.config.model_type != "bert" or head not in ("mean", "cls"):
        return f"no plain classifier can be made of a {model.encoder.config.model_type} encoder with a {head} head"
    if (folder / "tokenizer_config.json").exists():
        return None
    config = copy.deepcopy(model.encoder.config)
    config.id2label, config.label2id = model.config.id2label, model.config.label2id
    plain = BertForSequenceClassification(config)
    plain.bert.load_state_dict(model.encoder.state_dict(), strict=False)
    plain.bert.pooler.dense.load_state_dict(model.teacher.dense.state_dict())
    plain.classifier.load_state_dict(model.teacher.out.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Older versions of transformers do not know the class that newer ones write.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return None
