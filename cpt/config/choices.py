"""A folder of choices: `{name: cosine, peak: 3e-4}` means the settings in the one file `cosine.py` of that folder.

The folder is its own registry. A file in it opens with a frozen dataclass `Settings` and holds one class, named by the
folder's custom (`Schedule`, `Model`, `Method`). Which folder a field chooses from is told by the dataclass that has the
field: `field(metadata=chosen_from("cpt.schedules"))`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

from cpt.config.faults import Fault, nearest


def chosen_from(folder: str) -> dict[str, str]:
    """Metadata of a dataclass field whose value is the `Settings` of one file of the package `folder`."""
    return {"folder": folder}


def names_of_choices(folder: str) -> list[str]:
    """Names of the files of the package `folder`, sorted; files that begin with an underscore are not choices."""
    package = importlib.import_module(folder)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_") and not m.ispkg)


def settings_of_choice(folder: str, name: str) -> type:
    """The `Settings` dataclass of the file `name` in the package `folder`; Fault with near names if there is none."""
    known = names_of_choices(folder)
    if name not in known:
        raise Fault(f"name = {name}: there is no such choice in {folder}; {nearest(name, known)}")
    return importlib.import_module(f"{folder}.{name}").Settings


def name_of_choice(settings: Any) -> str:
    """The name under which these settings were chosen: the name of the file that defines them."""
    return type(settings).__module__.rsplit(".", 1)[-1]


def beside(settings: Any, name: str) -> Any:
    """What the file that defines `settings` has under `name`: `beside(model_settings, "CUTS")`."""
    return getattr(sys.modules[type(settings).__module__], name)


def build(settings: Any, kind: str, *arguments: Any, **named: Any) -> Any:
    """Make the class `kind` of the file that defines `settings`: `build(settings, "Schedule", stage_tokens)`."""
    return beside(settings, kind)(settings, *arguments, **named)
