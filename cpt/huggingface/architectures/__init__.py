"""What Hugging Face calls our models: one file each, named as the file of the model in cpt/models.

A file holds
    ARCHITECTURES                     what config.json may say under `architectures` -> under `model_type`
    tensors(settings)                 their name of each tensor -> `Stored`: which of our parameters it holds, and how;
                                      in the model's order, each parameter of ours once
    tied_names(settings)              tensors that a file may hold a second time -> what they repeat
    is_no_weight(name)                tensors of old files that are computed and not learned
    config_of(settings)               the lines of config.json that say the model's shape, `architectures` among them;
                                      Fault if transformers has no architecture that computes these settings
    settings_of(config, where)        the other way; Fault with every line that our model cannot do

A reader of one parameter asks `names(tensors)` for the tensor that holds it and `Stored.split` for its part; a writer
goes through `tensors` and asks `Stored.join`. Where `Stored.is_only_renamed`, neither touches a value.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from cpt.config.choices import names_of_choices
from cpt.config.faults import Fault
from cpt.huggingface.architectures._stored import Stored

__all__ = ["Stored", "names", "of_config", "of_model"]


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
        is_asked = len(asked) == 1 and asked[0] in file.ARCHITECTURES
        if is_asked or (not asked and config.get("model_type") in file.ARCHITECTURES.values()):
            return name, file
    told = ", ".join(map(str, asked)) or config.get("model_type")
    known = ", ".join(architecture for file in files.values() for architecture in file.ARCHITECTURES)
    raise Fault(f"{where}: architectures = {told}: we do not have it; we have {known}")


def names(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Our name of each parameter -> their name of the tensor that holds it, perhaps with others."""
    return {ours: theirs for theirs, stored in tensors.items() for ours in stored.ours}
