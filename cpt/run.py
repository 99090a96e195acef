"""The sum of all settings: a `Run` is what one YAML file says, each part defined beside the code that it steers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cpt.config import Fault, build, chosen_from, read_mapping, read_settings
from cpt.data.order import Replay, Source
from cpt.engine import settings as engine_settings
from cpt.evaluation import held_out
from cpt.parallel import mesh
from cpt_kernels import switch


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with its own sources, schedule and length.

    `tokens` of all ranks, to train on; rounded up to whole steps. With `replay.accounting: adds_to_new` they are new
    tokens, and replay comes on top.
    """

    name: str
    tokens: int
    sources: dict[str, Source]
    schedule: Any = field(metadata=chosen_from("cpt.schedules"))
    replay: Replay | None = None

    def faults(self) -> list[str]:
        """A stage without sources or tokens, a schedule that does not fit into it."""
        faults = [] if self.tokens >= 1 else [f"tokens = {self.tokens}: at least 1"]
        if not self.sources:
            faults.append("sources: name at least one, such as {code: {corpus: data/code}}")
        if not faults and not (self.replay and self.replay.faults()):
            try:
                build(self.schedule, "Schedule", self.total_tokens, 0.0)
            except Fault as fault:
                faults.extend(fault.lines)
        return faults + [
            f"sources.{name}: names that begin with replay/ are taken by replay"
            for name in self.sources
            if name.startswith("replay/")
        ]

    @property
    def total_tokens(self) -> int:
        """Tokens to train on, replayed ones included."""
        if self.replay and self.replay.accounting == "adds_to_new":
            return math.ceil(self.tokens / (1 - self.replay.share))
        return self.tokens


@dataclass(frozen=True)
class Parent:
    """The run to continue, `at` a step or its latest checkpoint; `optimizer_state`: AdamW's moments, or zeros again."""

    run: Path
    at: str = "latest"
    optimizer_state: Literal["keep", "reset"] = "reset"

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that the parent was trained with; None if it kept none."""
        folder = self.run / "tokenizer"
        return folder if folder.is_dir() and any(folder.iterdir()) else None

    def faults(self) -> list[str]:
        """A place that is no step."""
        return [] if self.at == "latest" or self.at.isdigit() else [f"at = {self.at}: a step, or latest"]


@dataclass(frozen=True)
class Checkpoints:
    """Saved at the end of every stage and when asked to stop, and every `every_tokens`; the newest `keep_last` stay."""

    every_tokens: int | None = None
    keep_last: int = 2

    def faults(self) -> list[str]:
        """Counts below one."""
        faults = [] if self.keep_last >= 1 else [f"keep_last = {self.keep_last}: at least 1"]
        if self.every_tokens is not None and self.every_tokens < 1:
            faults.append(f"every_tokens = {self.every_tokens}: at least 1; leave it out to save at stage ends only")
        return faults


@dataclass(frozen=True)
class Log:
    """`every_steps`: which step lines are shown. `peak_tflops`: what MFU is measured against, None to find it."""

    every_steps: int = 1
    peak_tflops: float | None = None

    def faults(self) -> list[str]:
        """A count below one, a peak of nothing."""
        faults = [] if self.every_steps >= 1 else [f"every_steps = {self.every_steps}: at least 1"]
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            faults.append(f"peak_tflops = {self.peak_tflops}: above 0; leave it out to have it found")
        return faults


@dataclass(frozen=True)
class Run:
    """One training job. `output` is its folder; everything else says what is trained on what, and how."""

    output: Path
    stages: tuple[Stage, ...]
    seed: int = 1
    parent: Parent | None = None
    model: Any | None = field(default=None, metadata=chosen_from("cpt.models"))
    sequence_length: int = 2048
    batch: engine_settings.Batch = field(default_factory=engine_settings.Batch)
    precision: Literal["bf16", "fp32"] = "bf16"
    optimizer: engine_settings.Optimizer = field(default_factory=engine_settings.Optimizer)
    zero: Literal[0, 1, 2, 3] = 1
    mesh: mesh.Settings = field(default_factory=mesh.Settings)
    kernels: switch.Settings = field(default_factory=switch.Settings)
    methods: tuple[Any, ...] = field(default=(), metadata=chosen_from("cpt.methods"))
    evaluation: held_out.Settings = field(default_factory=held_out.Settings)
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    log: Log = field(default_factory=Log)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> engine_settings.Settings:
        """The part that the engine reads."""
        return engine_settings.Settings(self.precision, self.zero, self.batch, self.optimizer, self.deepspeed)

    @property
    def tokens_a_step(self) -> int:
        """Tokens of one step, all ranks together."""
        return self.batch.windows * self.sequence_length

    def num_steps(self, stage: Stage) -> int:
        """Whole steps that a stage's tokens take."""
        return -(-stage.total_tokens // self.tokens_a_step)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run, in whole steps."""
        return sum(self.num_steps(stage) for stage in self.stages) * self.tokens_a_step

    def faults(self) -> list[str]:
        """Contradictions between parts."""
        faults = self.engine.faults()
        if not self.stages:
            faults.append("stages: name at least one")
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        faults.extend(f"stages: more than one is called {name}; give each its own name" for name in twice)
        if self.sequence_length < 2:
            faults.append(f"sequence_length = {self.sequence_length}: at least 2")
        longest = getattr(self.model, "longest_sequence", self.sequence_length)
        if self.sequence_length > longest:
            faults.append(
                f"sequence_length = {self.sequence_length}: the model takes up to {longest}; "
                "lower it or raise model.longest_sequence"
            )
        if self.model is None:
            faults.append(
                "model is not set; name one, such as {name: llama, vocabulary: 32000}, or a parent to take it from"
            )
        return faults


def read_run(words: Sequence[str]) -> Run:
    """The run that YAML files and key=value words describe; a child takes model and sequence length from its parent.

    Raises Fault with every mistake at once.
    """
    mapping = read_mapping(words)
    parent = mapping.get("parent")
    faults: list[str] = []
    if isinstance(parent, dict) and isinstance(parent.get("run"), str):
        try:
            inherited = _settings_of(Path(os.path.expanduser(parent["run"])))
            mapping = {**{key: inherited[key] for key in ("model", "sequence_length") if key in inherited}, **mapping}
        except Fault as fault:
            faults.extend(fault.lines)
    try:
        run = read_settings(Run, mapping)
    except Fault as fault:
        faults.extend(fault.lines)
    if faults:
        raise Fault(faults)
    return run


# What may change when a run is taken up again: it alters how a step is computed, not what is learned from what.
FREE_TO_CHANGE = (
    "output",
    "zero",
    "mesh",
    "kernels",
    "evaluation",
    "checkpoint",
    "log",
    "deepspeed",
    "batch.micro_batch",
)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines that tell which settings differ between two `run.yaml` mappings, without those that are free to change."""
    old_lines, new_lines = (dict(_flat(plain)) for plain in (old, new))
    keys = [key for key in {**old_lines, **new_lines} if not _is_free(key)]
    return [
        f"{key} is {new_lines.get(key, 'not set')}, the run began with {old_lines.get(key, 'none')}"
        for key in keys
        if old_lines.get(key) != new_lines.get(key)
    ]


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)


def _flat(plain: Any, where: str = "") -> list[tuple[str, Any]]:
    if isinstance(plain, dict) and plain:
        return [pair for key, value in plain.items() for pair in _flat(value, f"{where}.{key}" if where else str(key))]
    if isinstance(plain, list) and plain:
        return [pair for index, value in enumerate(plain) for pair in _flat(value, f"{where}.{index}")]
    return [(where, plain)]


def _settings_of(folder: Path) -> dict[str, Any]:
    """The mapping in the `run.yaml` of a run folder."""
    path = folder / "run.yaml"
    if not path.is_file():
        around = [p.parent.name for p in folder.parent.glob("*/run.yaml")] if folder.parent.is_dir() else []
        there = f"; beside it there are: {', '.join(sorted(around)[:5])}" if around else ""
        raise Fault(f"parent.run = {folder}: there is no run (no {path}){there}")
    return read_mapping([str(path)])
