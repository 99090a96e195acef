"""A trained model by its place: a run folder, one checkpoint of it, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpt.checkpoint import Checkpoint, RunFolder
from cpt.config import Fault, build, name_of_choice, read_mapping, read_settings
from cpt.config.choices import settings_of_choice
from cpt.data.corpus import Corpus
from cpt.data.shards import idx_path
from cpt.huggingface.load import read_folder
from cpt.huggingface.readers import Chained, Reader, whole
from cpt.huggingface.tensor_file import open_file
from cpt.run import model_after, stages_trained
from cpt_kernels import switch


@dataclass(frozen=True)
class TrainedModel:
    """Settings and fp32 weights of a model, each weight read when asked for; `run` is None for a Hugging Face folder.

    `run_settings`: what `run.yaml` says, as plain mappings.
    """

    settings: Any
    weights: Mapping[str, torch.Tensor]
    tokenizer: Path | None
    run: Path | None
    run_settings: dict[str, Any]
    checkpoint: Checkpoint | None

    @property
    def name(self) -> str:
        """Which of our models it is."""
        return name_of_choice(self.settings)

    def built(self) -> nn.Module:
        """The model with its weights, fp32, in evaluation mode, on the first GPU or the CPU."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = build(self.settings, "Model", switch.choose(switch.Settings(), device))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weights[name].float())
        return model.to(device).eval()

    def held_out(self) -> dict[str, Path]:
        """The held-out corpora that its run names; those whose files are gone are left out."""
        named = self.run_settings.get("evaluation", {}).get("held_out", {})
        return {name: path for name, path in zip(named, map(Path, named.values()), strict=True) if _is_there(path)}

    def windows_of_held_out(self, num_windows: int = 8) -> torch.Tensor | None:
        """The first windows of the first held-out corpus, [num_windows, S + 1]; None if there is none."""
        for path in self.held_out().values():
            corpus, length = Corpus.open(path), self.run_settings["sequence_length"]
            number = min(num_windows, corpus.num_windows(length))
            ids = torch.arange(number).numpy()
            return torch.from_numpy(corpus.windows(ids, length)) if number else None
        return None


def open_model(path: Path) -> TrainedModel:
    """The model at `path`. Raises Fault if there is none, or if it is damaged."""
    if (path / "config.json").is_file():
        _, settings, weights = read_folder(path)
        return TrainedModel(settings, weights, path, None, {}, None)
    if (path / "checksums.json").is_file():
        return _of_run(path.resolve().parents[1], Checkpoint(path))
    if (path / "run.yaml").is_file():
        checkpoint = RunFolder(path).latest()
        if checkpoint is None:
            raise Fault(f"{path}: the run has saved no checkpoint yet")
        return _of_run(path, checkpoint)
    raise Fault(
        f"{path}: no model is here; name a run folder (with run.yaml), a checkpoint (.../checkpoints/step-...), or a "
        "Hugging Face folder (with config.json)"
    )


def _is_there(corpus: Path) -> bool:
    """A folder or a file, or a prefix in Megatron's format."""
    return corpus.exists() or idx_path(corpus).exists()


def _of_run(run: Path, checkpoint: Checkpoint) -> TrainedModel:
    if not (run / "run.yaml").is_file():
        raise Fault(f"{run / 'run.yaml'} is missing: it says which model a checkpoint is of; copy the run's beside it")
    plain = read_mapping([str(run / "run.yaml")])
    if not isinstance(plain.get("model"), dict):
        raise Fault(f"{run / 'run.yaml'} names no model; it is not as a run wrote it")
    model = dict(model_after(plain, stages_trained(checkpoint.state["progress"])))
    settings = read_settings(settings_of_choice("cpt.models", model.pop("name")), model, "model")
    tokenizer = run / "tokenizer"
    return TrainedModel(
        settings, _Masters(checkpoint), tokenizer if tokenizer.is_dir() else None, run, plain, checkpoint
    )


class _Masters(Mapping[str, torch.Tensor]):
    """The fp32 masters of a checkpoint by name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._shapes = checkpoint, checkpoint.shapes
        self._files: dict[Path, Mapping[str, Reader]] = {}

    def reader(self, name: str) -> Reader:
        """Reads a master in pieces, however many ranks wrote it; an imported one in the type that it came in."""
        if self._checkpoint.is_in_columns("master", name):
            return _InColumns(self._checkpoint, name)
        places = self._checkpoint.places("master", name)
        parts = [(first, last, self._file(file)[key]) for first, last, file, key in places]
        return Chained(self._shapes[name], parts)

    def __getitem__(self, name: str) -> torch.Tensor:
        return whole(self.reader(name)).float()

    def _file(self, file: Path) -> Mapping[str, Reader]:
        if file not in self._files:
            self._files[file], _ = open_file(file)
        return self._files[file]

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # a Mapping would read the weight to see

    def __iter__(self):
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class _InColumns(Reader):
    """A master of which each rank of a tensor group wrote some columns."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.shape, self.dtype = checkpoint.shapes[name], torch.float32
        self._checkpoint, self._name = checkpoint, name

    def read_into(self, start: int, out: torch.Tensor) -> None:
        """From the rows that they lie in."""
        out.copy_(self._checkpoint.read("master", self._name, start, start + len(out)))
