"""The full model as one ONNX graph (padded batch in, logits out), and its quantised forms; each is made once.

The head is geep's own: the graph is exported from a TorchScript trace of the whole model, so that ONNX Runtime and
OpenVINO run the very weights that are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from worker import Job


def tokenizer_of(job: Job) -> Any:
    """The tokenizer of the exported folder."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(Path(job.export_dir) / "plain")


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """Make a file unless it is there; it appears whole or not at all."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        make(partial)
        partial.rename(path)
    return path


def full(job: Job) -> Path:
    """The graph in float32."""

    def export(path: Path) -> None:
        import torch

        example = torch.zeros((2, 8), dtype=torch.int64)
        rows = {0: "texts", 1: "tokens"}
        torch.onnx.export(
            torch.jit.load(Path(job.export_dir) / "full.ts"),
            (example, torch.ones_like(example)),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": rows, "attention_mask": rows, "logits": {0: "texts"}},
            opset_version=20,
            dynamo=False,
        )

    return _made(Path(job.export_dir) / "full.onnx", export)


def dynamic_int8(job: Job) -> Path:
    """ONNX Runtime's dynamic quantisation: int8 weights by output channel, activations by batch."""

    def quantise(path: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(str(full(job)), str(path), per_channel=True, weight_type=QuantType.QInt8)

    return _made(Path(job.export_dir) / "dynamic-int8.onnx", quantise)


def static_int8(job: Job) -> Path:
    """NNCF's post-training quantisation for transformers, calibrated on training texts."""
    path = Path(job.export_dir) / "static-int8.xml"
    if not path.exists():
        import nncf
        import openvino

        ids = tokenizer_of(job)(job.calibration_texts, truncation=True, max_length=job.max_length)["input_ids"]

        def inputs(row: list[int]) -> dict[str, Any]:
            return {"input_ids": np.array([row]), "attention_mask": np.ones((1, len(row)), dtype=np.int64)}

        quantised = nncf.quantize(
            openvino.Core().read_model(full(job)),
            nncf.Dataset(ids, inputs),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(ids),
        )
        partial = path.with_name("partial.xml")
        openvino.save_model(quantised, partial)
        partial.with_suffix(".bin").rename(path.with_suffix(".bin"))
        partial.rename(path)
    return path
