"""The models whose shapes benchmarks take, by name; those of known models are as in configs/models."""

from __future__ import annotations

from typing import Any

from cpt.models import llama, pythia
from cpt.models.rope_scaling import llama3

MODELS: dict[str, Any] = {
    "pythia-410m": pythia.Settings(vocabulary=50304, width=1024, layers=24, heads=16),
    "llama-3.2-1b": llama.Settings(
        vocabulary=128256, width=2048, layers=16, heads=32, kv_heads=8, head_width=64, mlp_width=8192,
        rope_base=500000.0, tied=True, longest_sequence=131072,
        rope_scaling=llama3.Settings(
            factor=32, original_length=8192, low_frequency_factor=1, high_frequency_factor=4
        ),
    ),
    "llama-3-8b": llama.Settings(
        vocabulary=128256, width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336, rope_base=500000.0,
        longest_sequence=8192,
    ),
    # As in configs/quickstart/base.yaml.
    "quickstart": llama.Settings(vocabulary=2048, width=128, layers=4, heads=4, kv_heads=2, mlp_width=384),
    "small-llama": llama.Settings(vocabulary=4096, width=512, layers=4, heads=8, kv_heads=4, mlp_width=1536),
    "small-pythia": pythia.Settings(vocabulary=4096, width=512, layers=4, heads=8),
}  # fmt: skip
