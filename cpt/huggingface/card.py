"""README.md of an exported folder: what it is, how to load it, where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch


def model_card(model_name: str, settings: Any, dtype: torch.dtype, lineage: Mapping[str, Any] | None) -> str:
    """A stub in Markdown for its owner to finish; the lineage in full, if there is one."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [cpt, continual-pretraining]",
        "---",
        "",
        f"# A {model_name} of {settings.num_parameters:,} parameters",
        "",
        f"Exported by cpt as {str(dtype).removeprefix('torch.')}.",
        "`certificate.json` says that it is the trained model: every tensor with its hash, and its logits against",
        "those of the trained weights on a probe.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
        "```",
        "",
        "To be written by its owner: the data, its licence, what the model is for and what it is not for.",
    ]
    if lineage:
        lines += ["", "## Lineage", "", "```json", json.dumps(lineage, indent=2, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"
