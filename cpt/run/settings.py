"""What one YAML file says: a `Run` is the sum of all settings, each part defined beside the code that it steers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from cpt.checkpoint import keep
from cpt.checkpoint import settings as checkpoint_settings
from cpt.config import Fault, build, chosen_from, name_of_choice
from cpt.data import loader
from cpt.data.replay import Replay
from cpt.data.streams import Source
from cpt.engine import loss_scale
from cpt.engine import settings as engine_settings
from cpt.engine.deepspeed_block import unfit
from cpt.evaluation import guard, held_out, raise_replay, start_gate
from cpt.models.growth import Growth
from cpt.models.layers import compiled, recompute
from cpt.models.layers.cutting import faults_of_cut
from cpt.models.layers.parting import blocks_of_parts, faults_of_parts, ranges_of
from cpt.models.layers.sharing import faults_of_sharing
from cpt.parallel import health, mesh, watch
from cpt.progress import Progress
from cpt.run import bad_steps
from cpt.run.batch_warmup import BatchWarmup
from cpt_kernels import switch


@dataclass(frozen=True)
class Rope:
    """Rotary positions from a stage on: what is named replaces the model's `rope_base`, `rope_scaling` (one of
    cpt/models/rope_scaling) and `longest_sequence`; what is not stays.
    """

    base: float | None = None
    scaling: Any | None = field(default=None, metadata=chosen_from("cpt.models.rope_scaling"))
    longest_sequence: int | None = None

    def faults(self) -> list[str]:
        """Nothing changed."""
        return [] if any(vars(self).values()) else ["names nothing: set base, scaling or longest_sequence"]

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of a model's settings that it replaces."""
        named = {"rope_base": self.base, "rope_scaling": self.scaling, "longest_sequence": self.longest_sequence}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with its own sources, schedule and length.

    `tokens` of all ranks, to train on; rounded up to whole steps. With `replay.accounting: adds_to_new` they are new
    tokens, and replay comes on top. `continues`, of a child's first stage: its windows are those with which the
    parent's stage goes on from the child's beginning, in their order; sources, replay and seed are the parent's.
    """

    name: str
    tokens: int
    sources: dict[str, Source]
    schedule: Any = field(metadata=chosen_from("cpt.schedules"))
    replay: Replay | None = None
    rope: Rope | None = None
    batch_warmup: BatchWarmup | None = None
    continues: bool = False

    def faults(self) -> list[str]:
        """A stage without sources or tokens, a schedule that does not fit into it."""
        faults = [] if self.tokens >= 1 else [f"tokens = {self.tokens}: at least 1"]
        if not self.sources:
            faults.append("sources: name at least one, such as {code: {corpus: data/code}}")
        if not faults and not (self.replay and self.replay.faults()):
            ramp = self.replay.ramp if self.replay else None
            if ramp and ramp.tokens > self.total_tokens and not self.continues:
                faults.append(f"replay.ramp.tokens = {ramp.tokens}: the stage has {self.total_tokens} in all; lower it")
            try:
                # Whether the rate before it is one that it can follow, is known when the run begins.
                build(self.schedule, "Schedule", self.total_tokens, math.inf)
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
        return self.replay.total_tokens(self.tokens) if self.replay else self.tokens


@dataclass(frozen=True)
class Parent:
    """The run to continue, `at` a step or its latest checkpoint."""

    run: Path
    at: str = "latest"

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that the parent was trained with; None if it kept none."""
        folder = self.run / "tokenizer"
        return folder if folder.is_dir() and any(folder.iterdir()) else None

    def faults(self) -> list[str]:
        """A place that is no step."""
        return [] if self.at == "latest" or self.at.isdigit() else [f"at = {self.at}: a step, or latest"]


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
    """One training job. `output` is its folder; everything else says what is trained on what, and how.

    `weights`: the Hugging Face folder that the model begins with, as `model: {from: FOLDER}` sets it.
    `growth`: the larger vocabulary that it gets, as `model: {from: FOLDER, vocabulary: {grow_to: TOKENIZER}}` sets it.
    `optimizer_state` of a run that begins from weights: AdamW's moments as the parent left them (`keep`), zeros
    (`reset`), or filled by n steps at learning rate 0 on what the first stage begins with (`warm(n)`).
    `attention`: whether a token sees the documents before its own in the window, and is trained to be foretold from
    them; left out, the model's own custom.
    """

    output: Path
    stages: tuple[Stage, ...]
    seed: int = 1
    parent: Parent | None = None
    model: Any | None = field(default=None, metadata=chosen_from("cpt.models"))
    weights: Path | None = None
    growth: Growth | None = None
    optimizer_state: str = "reset"
    gate: start_gate.Settings = field(default_factory=start_gate.Settings)
    sequence_length: int = 2048
    attention: Literal["within_document", "across_documents"] | None = None
    batch: engine_settings.Batch = field(default_factory=engine_settings.Batch)
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    loss_scale: loss_scale.Settings = field(default_factory=loss_scale.Settings)
    optimizer: engine_settings.Optimizer = field(default_factory=engine_settings.Optimizer)
    zero: Literal[0, 1, 2, 3] = 1
    recompute: recompute.Settings = field(default_factory=recompute.Settings)
    compile: compiled.Settings = field(default_factory=compiled.Settings)
    mesh: mesh.Settings = field(default_factory=mesh.Settings)
    kernels: switch.Settings = field(default_factory=switch.Settings)
    methods: tuple[Any, ...] = field(default=(), metadata=chosen_from("cpt.methods"))
    evaluation: held_out.Settings = field(default_factory=held_out.Settings)
    stop_if: guard.Settings = field(default_factory=guard.Settings)
    raise_replay: raise_replay.Settings = field(default_factory=raise_replay.Settings)
    bad_steps: bad_steps.Settings = field(default_factory=bad_steps.Settings)
    checkpoint: checkpoint_settings.Settings = field(default_factory=checkpoint_settings.Settings)
    loader: loader.Settings = field(default_factory=loader.Settings)
    log: Log = field(default_factory=Log)
    health: health.Settings = field(default_factory=health.Settings)
    watch: watch.Settings = field(default_factory=watch.Settings)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> engine_settings.Settings:
        """The part that the engine reads."""
        return engine_settings.Settings(
            self.precision, self.zero, self.batch, self.optimizer, self.deepspeed, self.loss_scale
        )

    @property
    def warm_steps(self) -> int:
        """Steps at learning rate 0 before the first one, which fill AdamW's moments."""
        found = re.fullmatch(r"warm\((\d+)\)", self.optimizer_state)
        return int(found[1]) if found else 0

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the tokenizer of what the run begins from, if known; of what it grows to, if it does."""
        if self.growth:
            return self.growth.grow_to
        if self.weights:
            has_one = any((self.weights / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
            return self.weights if has_one else None
        return self.parent.tokenizer if self.parent else None

    @property
    def tokens_a_step(self) -> int:
        """Tokens of one step, all ranks together, where no stage's batch is still growing."""
        return self.batch.windows * self.sequence_length

    def model_of(self, stage: int) -> Any:
        """The model's settings in the stage of that number: rotary positions as the stages up to it change them."""
        changes = [s.rope.changes for s in self.stages[: stage + 1] if s.rope]
        return dataclasses.replace(self.model, **{name: value for one in changes for name, value in one.items()})

    @property
    def model_before(self) -> Any:
        """The model's settings before the first step: positions as it was given, but room for this run's windows."""
        longest = max(self.model.longest_sequence, self.model_of(0).longest_sequence)
        return dataclasses.replace(self.model, longest_sequence=longest)

    @property
    def is_within_documents(self) -> bool:
        """Whether attention and loss stay within a document."""
        if self.attention is None:
            return not self.model.attends_across_documents
        return self.attention == "within_document"

    @property
    def blocks_of_parts(self) -> list[range]:
        """The model's blocks on each part of the pipeline."""
        if self.mesh.blocks_of_parts:
            return ranges_of(self.mesh.blocks_of_parts)
        return blocks_of_parts(self.model, self.sequence_length, self.mesh.pipeline)

    def windows_at(self, stage: Stage, progress: Progress) -> int:
        """Windows of the next step, all ranks together."""
        if stage.batch_warmup is None:
            return self.batch.windows
        return stage.batch_warmup.windows_at(progress.stage_tokens, self.batch.windows, stage.total_tokens)

    def num_steps(self, stage: Stage, tokens_done: int = 0) -> int:
        """Whole steps that a stage's tokens take, or those that are left after `tokens_done`."""
        return sum(number for number, _ in self._steps(stage, tokens_done))

    def num_slots(self, stage: Stage, tokens_done: int = 0) -> int:
        """Windows of a whole stage of which `tokens_done` are behind us, perhaps in steps of another size."""
        to_come = sum(number * windows for number, windows in self._steps(stage, tokens_done))
        return tokens_done // self.sequence_length + to_come

    def tokens_before_last_step(self, stage: Stage) -> int:
        """Tokens of a stage that are behind when its last step begins."""
        *_, (_, windows) = self._steps(stage)
        return (self.num_slots(stage) - windows) * self.sequence_length

    def _steps(self, stage: Stage, tokens_done: int = 0) -> Iterator[tuple[int, int]]:
        """How many steps of how many windows are still to come, in their order."""
        ends = stage.batch_warmup.ends(self.batch.windows, stage.total_tokens) if stage.batch_warmup else []
        for end in [*ends, stage.total_tokens]:
            if tokens_done < end:
                windows = self.windows_at(stage, Progress(stage_tokens=tokens_done))
                number = -(-(min(end, stage.total_tokens) - tokens_done) // (windows * self.sequence_length))
                yield number, windows
                tokens_done += number * windows * self.sequence_length

    @property
    def num_bytes_of_checkpoint(self) -> int:
        """On the disk, with all that the methods keep."""
        num_copies = sum(build(method, "Method").num_copies for method in self.methods)
        return keep.num_bytes_of_checkpoint(self.model.num_parameters, num_copies)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run, in whole steps."""
        return sum(self.num_slots(stage) for stage in self.stages) * self.sequence_length

    def faults(self) -> list[str]:
        """Contradictions between parts."""
        faults = self.engine.faults()
        if not self.stages:
            faults.append("stages: name at least one")
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        faults.extend(f"stages: more than one is called {name}; give each its own name" for name in twice)
        methods = [name_of_choice(method) for method in self.methods]
        twice = sorted({name for name in methods if methods.count(name) > 1})
        faults.extend(f"methods: {name} is named more than once; they would share their state" for name in twice)
        if self.parent and self.parent.run.absolute() == self.output.absolute():
            faults.append(f"output = {self.output}: this is the parent's own folder; name another")
        faults.extend(self._faults_of_start())
        if self.sequence_length < 2:
            faults.append(f"sequence_length = {self.sequence_length}: at least 2")
        longest = self.model_of(0).longest_sequence if self.model and self.stages else self.sequence_length
        if self.sequence_length > longest:
            faults.append(
                f"sequence_length = {self.sequence_length}: the model takes up to {longest}; "
                "lower it or raise model.longest_sequence"
            )
        faults.extend(self._faults_of_hold_outs())
        faults.extend(self._faults_of_guards())
        faults += [
            f"stages.{index}.batch_warmup.{line}"
            for index, stage in enumerate(self.stages)
            if stage.batch_warmup and not stage.batch_warmup.faults()
            for line in stage.batch_warmup.faults_with(self.batch.windows, self.batch.micro_batch, stage.total_tokens)
        ]
        faults.extend(self._faults_of_mesh())
        if self.model is not None:
            faults.extend(self.recompute.faults_of(self.model.layers))
        profiler = self.deepspeed.get("flops_profiler")
        is_profiled = isinstance(profiler, dict) and profiler.get("enabled", False) is True
        if is_profiled and self.compile.blocks and self.recompute.mode == "full":
            faults.append(
                "deepspeed.flops_profiler with compile.blocks and recompute.mode = full: it exchanges "
                "torch's functions between a block and its second run, which then differ; leave one of the three out"
            )
        if self.model is None:
            faults.append(
                "model is not set; name one, such as {name: llama, vocabulary: 32000}, or a parent to take it from"
            )
        return faults

    def faults_on(self, num_ranks: int) -> list[str]:
        """Why so many ranks cannot train it, with values that would do."""
        if faults := self.mesh.faults_on(
            num_ranks, lambda mesh: not dataclasses.replace(self, mesh=mesh)._faults_of_mesh()
        ):
            return faults
        unit = self.mesh.data_size(num_ranks) * (self.batch.micro_batch or 1)
        counts = {
            f"stages.{index}.batch_warmup.{name}": count
            for index, stage in enumerate(self.stages)
            if stage.batch_warmup
            for name in ("windows", "increment")
            if (count := getattr(stage.batch_warmup, name)) and count % unit
        }
        return self.batch.faults_on(self.mesh.data_size(num_ranks)) + [
            f"{name} = {count}: on {self.mesh.data_size(num_ranks)} ranks that see different windows, in micro-batches "
            f"of {self.batch.micro_batch}, it must be a multiple of {unit}"
            for name, count in counts.items()
        ]

    def _faults_of_mesh(self) -> list[str]:
        """A model that the axes cannot cut."""
        pipeline, faults = self.mesh.pipeline, self.mesh.faults_of_norms(self.sequence_length)
        if self.model is not None and self.mesh.tensor >= 1:
            faults += faults_of_cut(self.model, self.mesh.tensor)
        if self.model is not None and min(self.mesh.tensor, self.mesh.sequence) >= 1:
            faults += faults_of_sharing(self.model, self.sequence_length, self.mesh.sequence, self.mesh.tensor)
        if self.model is not None and pipeline >= 1:
            faults += faults_of_parts(self.model.layers, pipeline, self.mesh.blocks_of_parts)
        if pipeline > 1 and self.zero > 1:
            faults.append(
                f"zero = {self.zero} with mesh.pipeline = {pipeline}: each part adds up the gradients of many "
                "micro-batches before they are sent, so they cannot be cut as they come; use zero = 1"
            )
        return faults + unfit(self.deepspeed, self.mesh.tensor) + self._faults_of_overlap()

    def _faults_of_overlap(self) -> list[str]:
        """Nothing to let go on, or nobody who knows what comes beside it."""
        name, apart = "compile.overlaps_sums = true", "blocks are compiled operation by operation then; use"
        if not self.compile.overlaps_sums:
            return []
        faults = []
        if self.mesh.tensor == 1:
            faults.append(f"{name} with mesh.tensor = 1: it is sums over tensor ranks that it lets go on; leave it out")
        if self.zero == 3:
            faults.append(f"{name} with zero = 3: {apart} zero = 2")
        if self.recompute.mode == "selective" and self.model is not None and self.is_within_documents:
            faults.append(f"{name} with recompute.mode = selective within documents: {apart} none or full")
        return faults

    def _faults_of_start(self) -> list[str]:
        """Two origins of the weights, moments that cannot be had."""
        faults = []
        if self.parent and self.weights:
            faults.append(f"parent.run = {self.parent.run} and weights = {self.weights}: a run begins from one of them")
        if self.optimizer_state not in ("keep", "reset") and not self.warm_steps:
            faults.append(f"optimizer_state = {self.optimizer_state}: keep, reset, or warm(n) with n steps, at least 1")
        for index, stage in enumerate(self.stages):
            if stage.continues and (index > 0 or not self.parent):
                faults.append(
                    f"stages.{index}.continues: only the first stage of a run with a parent can go on with the parent's"
                )
        if self.growth and not self.weights:
            faults.append("growth: only weights that are there can grow; name them as model: {from: FOLDER, ...}")
        if self.optimizer_state == "keep" and self.weights:
            faults.append("optimizer_state = keep: a Hugging Face folder holds no moments; use reset or warm(100)")
        return faults

    def _faults_of_guards(self) -> list[str]:
        """Limits on what is not scored."""
        of_sources = [name for stage in self.stages for name, source in stage.sources.items() if source.hold_out]
        scored = list(dict.fromkeys([*self.evaluation.held_out, *self.evaluation.ends, *of_sources]))
        limits = {"stop_if": self.stop_if.forgetting, "raise_replay": self.raise_replay.forgetting}
        faults = [
            f"{guard}.forgetting.{index}.source = {limit.source}: no held-out text is called so; scored are: "
            f"{', '.join(scored) or 'none, name some in evaluation.held_out'}"
            for guard, of_guard in limits.items()
            for index, limit in enumerate(of_guard)
            if limit.source not in scored
        ]
        return faults + (self._faults_of_raising() if self.raise_replay.forgetting else [])

    def _faults_of_raising(self) -> list[str]:
        """Nothing to raise, nothing that says when, shares that something else moves."""
        faults, at_most = [], self.raise_replay.at_most
        replays = {index: stage.replay for index, stage in enumerate(self.stages) if stage.replay}
        if not replays:
            faults.append("raise_replay: no stage replays anything; give one what to begin with, replay: {share: 5%}")
        if self.evaluation.every_tokens is None:
            faults.append("raise_replay: it looks at evaluations within a stage; set evaluation.every_tokens")
        for index, replay in replays.items():
            where = f"stages.{index}.replay"
            if replay.ramp:
                faults.append(f"{where}.ramp with raise_replay: both move the share; leave one of them out")
            if not 0 < replay.share <= at_most:
                faults.append(
                    f"{where}.share = {float(replay.share):g}: with raise_replay it is what the share begins with and "
                    f"never falls below: above 0 and at most raise_replay.at_most = {float(at_most):g}"
                )
        return faults

    def _faults_of_hold_outs(self) -> list[str]:
        """Names of held-out text that mean two things."""
        held_out: dict[str, tuple[Path, Fraction]] = {}
        faults = []
        for index, stage in enumerate(self.stages):
            for name, source in stage.sources.items():
                where, is_held = f"stages.{index}.sources.{name}.hold_out", (source.corpus, source.hold_out)
                if source.hold_out and name in self.evaluation.held_out:
                    faults.append(f"{where}: evaluation.held_out names other text {name}; rename one of them")
                elif source.hold_out and held_out.setdefault(name, is_held) != is_held:
                    faults.append(f"{where}: an earlier stage holds out something else as {name}; make them the same")
        return faults
