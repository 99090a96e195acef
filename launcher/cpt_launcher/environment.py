"""The part of the environment that explains a run afterwards, kept in its folder; nothing that could be a secret."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# Only what steers ranks, their devices and how they talk: the rest of a person's environment is nobody's business.
KEPT = ("SLURM", "SRUN_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "PYTHON", "CUDA_", "OMP_", "MKL_", "MASTER_", "UCX_",
        "FI_", "TRITON_", "DS_", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_")  # fmt: skip
SECRET = ("TOKEN", "KEY", "SECRET", "PASS", "PWD", "CREDENTIAL", "AUTH", "COOKIE", "SESSION", "PRIVATE", "JWT")


def told_of(environment: Mapping[str, str]) -> list[str]:
    """`NAME=value` of the variables that matter, sorted; a name that looks like that of a secret has no value.

    A value that breaks the line is told as Python writes it.
    """
    lines = []
    for name, value in sorted(environment.items()):
        if name.startswith(KEPT):
            is_secret = any(word in name.upper() for word in SECRET)
            lines.append(f"{name}={'(left out)' if is_secret else value if value.isprintable() else repr(value)}")
    return lines


def keep_environment(environment: Mapping[str, str], path: Path) -> None:
    """Write those lines to a file that its owner alone may read. Raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write("".join(f"{line}\n" for line in told_of(environment)))
