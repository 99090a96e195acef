"""Settings as YAML, in full: what `run.yaml` holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cpt.config.read import as_mapping


def write_yaml(settings: Any, path: Path, head: str = "") -> None:
    """Write settings so that `read_settings` makes equal ones of them; aside first, then renamed."""
    text = yaml.safe_dump(as_mapping(settings), sort_keys=False, allow_unicode=True, width=110)
    aside = path.with_name(path.name + ".aside")
    aside.write_text("".join(f"# {line}\n" for line in head.splitlines()) + text, encoding="utf-8")
    aside.replace(path)
