"""Virtual environments of the rivals, made on demand: their pins collide with each other's.

torch is the version of constraints.txt everywhere, so that no rival gains or loses by it, and so that pip never takes a
CUDA build of gigabytes. On a machine without a GPU, offer pip the CPU build first (see constraints.txt).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "graphs": (
        TORCH,
        "transformers==5.23.0",
        "onnx==1.23.2",
        "onnxruntime==1.32.0",
        "openvino==2026.4.1",
        "nncf==3.4.0",
        # What geep's table and engine import: the table stands before OpenVINO, too.
        "accelerate==1.15.0",
        "lazy-loader==0.6",
    ),
    "lexical": ("scikit-learn==1.9.1",),
    # Distilling wants transformers below 5.4.
    "embeddings": (TORCH, "model2vec[distill,train]==0.10.0", "scikit-learn==1.9.1"),
    "sentence-transformers": (TORCH, "transformers==5.23.0", "sentence-transformers==6.2.0"),
    # Its own pins want NumPy below 2 and sentence-transformers below 4, which wants transformers below 5.
    "infinity": (TORCH, "transformers==4.57.6", "infinity-emb[torch]==0.0.78"),
}


class EnvironmentFailed(Exception):
    """A virtual environment could not be made."""


def ensure(name: str, envs_dir: Path) -> Path:
    """Return the Python of a rival's environment; install it where it is missing or was made of other requirements.

    Raises:
        EnvironmentFailed: If pip could not install it; the message holds pip's last lines.
    """
    requirements = REQUIREMENTS[name]
    folder = envs_dir / name
    python = folder / "bin" / "python"
    mark = folder / "made-of"
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()
    if mark.exists() and mark.read_text(encoding="utf-8") == digest:
        return python
    print(f"Installing into {folder}: {', '.join(requirements)}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    constraint = folder / "constraints.txt"
    constraint.write_text(TORCH + "\n", encoding="utf-8")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraint, *requirements],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise EnvironmentFailed(f"pip could not install {', '.join(requirements)}: {done.stderr.strip()[-400:]}")
    mark.write_text(digest, encoding="utf-8")
    return python
