"""Settings as YAML, in full: what `run.yaml` holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cpt.config.read import as_mapping
from cpt.config.yaml_text import to_yaml


def write_yaml(settings: Any, path: Path, head: str = "") -> None:
    """Write settings so that `read_settings` makes equal ones of them; aside first, then renamed."""
    text = to_yaml(as_mapping(settings))
    write_in_place(path, "".join(f"# {line}\n" for line in head.splitlines()) + text)


def write_in_place(path: Path, text: str) -> None:
    """Write a small file aside, onto the disk, and rename it: even a power cut leaves the old one or the new one.

    Raises OSError if the disk does not take it.
    """
    aside = path.with_name(f".{path.name}.aside")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
