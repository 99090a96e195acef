"""What Hugging Face calls our models: one file each, named as the file of the model in cpt/models.

A file holds
    ARCHITECTURE, MODEL_TYPE          what config.json says under `architectures` and `model_type`
    names(settings)                   our name of each parameter -> theirs
    tied_names(settings)              tensors that a file may hold a second time -> what they repeat
    is_no_weight(name)                tensors of old files that are computed and not learned
    config_of(settings)               the lines of config.json that say the model's shape
    settings_of(config, where)        the other way; Fault with every line that our model cannot do
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from cpt.config.choices import names_of_choices
from cpt.config.faults import Fault


def of_model(model_name: str) -> ModuleType:
    """The file that goes with `cpt/models/<model_name>.py`."""
    known = names_of_choices(__name__)
    if model_name not in known:
        raise Fault(f"model.name = {model_name}: no Hugging Face form of it is known here; there is {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{model_name}")


def of_config(config: Mapping[str, Any], where: str) -> tuple[str, ModuleType]:
    """(our model's name, its file) for a config.json; `where` begins the message of the Fault if we have none."""
    files = {name: of_model(name) for name in names_of_choices(__name__)}
    asked = config.get("architectures") or []
    for name, file in files.items():
        if asked == [file.ARCHITECTURE] or (not asked and config.get("model_type") == file.MODEL_TYPE):
            return name, file
    told = ", ".join(map(str, asked)) or config.get("model_type")
    known = ", ".join(file.ARCHITECTURE for file in files.values())
    raise Fault(f"{where}: architectures = {told}: we do not have it; we have {known}")
