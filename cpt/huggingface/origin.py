"""How the files of an imported folder lay, so that the same model goes out again as the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt.huggingface.load import FolderWeights
from cpt.tensor_writer import Layout

FILE_NAME = "import.json"


@dataclass(frozen=True)
class Origin:
    """The layout of a folder that was imported.

    dtypes: their name of each tensor -> its type as a safetensors header has it. headers: file name -> its header, word
    for word; none for legacy files. index: the index file word for word. generation_config: the file word for word.
    left_out: tensors that were in the files and are no weights, or repeat one.
    """

    dtypes: Mapping[str, str]
    headers: Mapping[str, str]
    index: str | None
    generation_config: str | None
    left_out: tuple[str, ...]

    @staticmethod
    def of_folder(folder: Path, weights: FolderWeights) -> Origin:
        """That of the folder which the weights were read from."""
        stored, generation = weights.files, folder / "generation_config.json"
        return Origin(
            {name: stored.tensors[name].stored_as for name in weights.tensors},
            dict(stored.headers),
            stored.index,
            generation.read_text(encoding="utf-8") if generation.is_file() else None,
            tuple(name for name in stored.tensors if name not in weights.tensors),
        )

    def as_json(self) -> dict[str, Any]:
        """For `import.json` in the run's folder."""
        return {"format_version": 1, **asdict(self)}

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Origin:
        """What `as_json` gave."""
        fields = {name: value for name, value in plain.items() if name != "format_version"}
        return Origin(**{**fields, "left_out": tuple(plain["left_out"])})

    def files(self) -> dict[str, Layout]:
        """File name -> its layout."""
        return {name: Layout.of_header(header) for name, header in self.headers.items()}
