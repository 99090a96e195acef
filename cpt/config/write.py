"""Settings as YAML, in full: what `run.yaml` holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpt.config.read import as_mapping
from cpt.config.yaml_text import to_yaml


def write_yaml(settings: Any, path: Path, head: str = "") -> None:
    """Write settings so that `read_settings` makes equal ones of them; aside first, then renamed."""
    text = to_yaml(as_mapping(settings))
    aside = path.with_name(path.name + ".aside")
    aside.write_text("".join(f"# {line}\n" for line in head.splitlines()) + text, encoding="utf-8")
    aside.replace(path)
