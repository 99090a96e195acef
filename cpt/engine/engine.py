"""One optimiser step on DeepSpeed: step(batch) -> StepResult; score(tokens); save; load.

    windows of this rank --micro-batches--> forward, after_forward, backward --DeepSpeed sums gradients-->
        before_update, AdamW on the sharded fp32 masters, after_update --refresh--> weights of the next step

Letters: B windows, S sequence length.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpt.checkpoint import Checkpoint, Content, write_checkpoint
from cpt.config import Fault
from cpt.engine.deepspeed_block import refuse_what_deepspeed_refuses, told_as_faults, unfit
from cpt.engine.left_out import leave_out, norm_before_update
from cpt.engine.loss_scale import LossScale, Scaled, refuse_without_fp16
from cpt.engine.micro_batches import MicroBatch, OneByOne, cut
from cpt.engine.pipeline import DEEPSPEED_SETTINGS, Pipeline
from cpt.engine.settings import Settings, deepspeed_settings
from cpt.engine.zero_three import cut_weights
from cpt.methods import Forward, Seams
from cpt.parallel.mesh import Mesh
from cpt.parallel.mpu import ModelParallelUnit, is_counted, mark_parts
from cpt.parallel.tensor import add_up_gradients
from cpt.parallel.together import together
from cpt.parallel.weights import MOMENTS, Masters
from cpt.progress import Progress
from cpt_kernels.documents import num_counting


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank.

    Losses are nats a token, exact means over the step's targets of all ranks that count; `loss` is 0 if none does.
    `loss_by_source` leaves out a source without any. `skipped`: the update was not made, because a gradient was not
    finite or who was asked said no. `stop_asked`, `save_asked`: some rank was asked to stop, or to save.
    """

    loss: float
    loss_by_source: dict[int, float]
    grad_norm: float
    skipped: bool
    stop_asked: bool
    save_asked: bool


class Engine:
    """A model under DeepSpeed with the methods hooked into its step.

    `model` maps (tokens [B, S], targets [B, S]) to token losses [B, S] in fp32; a third argument, `Documents`, comes
    with windows of which it is known where documents begin, and targets that do not count must then have loss 0.
    `make_optimizer(groups)` makes torch's AdamW for two parameter groups, with and without weight decay as
    `decays(name)` says. `make_model()` makes one more like `model`, for methods that need it. Call `fill` or `load`
    next: the weights in `model` do not count, because DeepSpeed would round them to bf16 before it makes its masters.
    Every call is collective: all ranks make it together.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        mesh: Mesh,
        methods: Sequence[Seams],
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        decays: Callable[[str], bool],
        make_model: Callable[[], nn.Module] | None = None,
    ) -> None:
        import deepspeed

        faults = settings.batch.faults_on(mesh.data_size) + unfit(settings.deepspeed, mesh.tensor.size)
        if faults:
            raise Fault(faults)
        if settings.precision == "fp16":
            refuse_without_fp16(mesh.device)
        made = deepspeed_settings(settings, mesh.data_size)
        refuse_what_deepspeed_refuses(made)
        self._settings, self._mesh, self._methods = settings, mesh, tuple(methods)
        named = list(model.named_parameters())
        groups = [
            {"params": [p for n, p in named if decays(n)], "weight_decay": settings.optimizer.weight_decay},
            {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0},
        ]
        self._model = model
        mark_parts(model)
        add_up_gradients(model)
        # BF16_Optimizer prints what memory there is, seven times, whatever its settings say.
        with contextlib.redirect_stdout(io.StringIO()), told_as_faults(settings.deepspeed):
            pipeline = Pipeline(model, mesh) if mesh.pipeline.size > 1 else None
            if settings.zero == 3:
                cut_weights(model, made, mesh, settings.precision)
            self._engine, *_ = deepspeed.initialize(
                model=pipeline.module if pipeline else model,
                optimizer=make_optimizer([g for g in groups if g["params"]]),
                config=made | ({"pipeline": DEEPSPEED_SETTINGS} if pipeline else {}),
                mpu=ModelParallelUnit(mesh) if mesh.tensor.size > 1 and not pipeline else None,
            )
        if pipeline:
            pipeline.use(self._engine)
        self._run: OneByOne | Pipeline = pipeline or OneByOne(self._engine, mesh)
        self._loss_scale = LossScale(settings.loss_scale) if settings.precision == "fp16" else None
        self._train = self._run.train
        if self._loss_scale:
            self._train = Scaled(self._run, self._engine, mesh, self._loss_scale, lambda: self._was_refused).train
        self.masters = Masters(self._engine, model, settings.zero, mesh)
        for method in self._methods:
            method.meet(model, make_model, self.masters, mesh)
        self._progress = Progress()
        self._clipped_norm = 0.0
        # Of the last step, of this rank's windows in their order: losses summed over targets, and targets that count.
        self._sums_of_windows, self._counts_of_windows = torch.zeros(0), torch.zeros(0)
        self._is_refused: Callable[[float], bool] | None = None  # whether the step that is going on is, by its norm
        self._was_refused = False
        # DeepSpeed's engines all end a step in one call of this bound method, at every ZeRO stage.
        self._update = self._engine.optimizer.step
        self._engine.optimizer.step = self._update_between_seams

    def fill(self, read: Callable[[str, int, int], torch.Tensor], check: bool = True) -> None:
        """Start from weights alone: masters and model equal `read(name, start, stop)`, moments and step count zero.

        `check`: read once more and compare, because a run whose masters are something else begins at the right loss
        and loses the model with its first step.
        """
        self.masters.fill(read)
        for moment in MOMENTS:
            self.masters.fill(lambda name, start, stop: torch.zeros(stop - start), moment)
        self.masters.num_updates = 0
        self.masters.refresh()
        differing = self.masters.differing(read) if check else []
        if self._mesh.any(bool(differing)):
            raise Fault(
                f"the fp32 masters are not the weights that were read ({(differing or ['elsewhere'])[0]}); "
                f"deepspeed = {self._settings.deepspeed}: leave these settings out"
            )
        if self._mesh.any(bool(self.masters.stale())):
            raise Fault(
                f"deepspeed = {self._settings.deepspeed}: with these settings DeepSpeed computes with other weights "
                "than its masters (zero_optimization.round_robin_gradients is known to do so); leave them out"
            )

    def step(
        self,
        tokens: torch.Tensor,
        sources: torch.Tensor,
        num_sources: int,
        rate: float,
        progress: Progress,
        stop_asked: bool = False,
        starts: torch.Tensor | None = None,
        save_asked: bool = False,
        is_bad: Callable[[float, float], bool] | None = None,
    ) -> StepResult:
        """Train once on this rank's windows `tokens` [B, S + 1], whose sources are numbered in `sources` [B].

        `rate`: learning rate of the update. `progress`: the place before the step. `starts` [B, S + 1] on the CPU is
        true where a token begins a document; on every rank or on none. With it attention stays inside a document and
        the first token of a document does not count as a target. A target that counts has the same weight wherever it
        stands; in a step without any, the gradient is zero and the update is made all the same.

        `is_bad(loss, gradient norm)` is asked before the update, alike on all ranks: if it says so, the update is left
        out, and weights, moments, their count and what methods keep stay as they were. It costs a sum over ranks and a
        norm more.
        """
        self._progress = progress
        for method in self._methods:
            method.before_batch(progress)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        counts = num_counting(tokens, starts)  # [B]
        size = self._settings.batch.micro_batch_on(self._mesh.data_size)
        micro_batches = cut(tokens, sources, starts, counts, size, self._mesh.device)
        self._expect(len(micro_batches))
        mean_count = None if starts is None else self._mean_count(counts, len(micro_batches))
        by_window: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of each micro-batch: sources, summed losses, [B]

        def mean(numbers: torch.Tensor) -> torch.Tensor:
            return numbers.mean() if mean_count is None else numbers.sum() / mean_count

        def loss_of(micro_batch: MicroBatch, outputs: Any) -> torch.Tensor:
            losses, beside = outputs if isinstance(outputs, tuple) else (outputs, None)
            # By name and not behind one another: fp16 may try a step more than once.
            by_window[id(micro_batch)] = micro_batch.sources, losses.detach().sum(dim=1, dtype=torch.float64)
            loss = mean(losses)
            for method in self._methods:
                extra = method.after_forward(Forward(progress, micro_batch.tokens, losses, beside, mean))
                loss = loss if extra is None else loss + extra
            return loss

        def sum_over_ranks() -> tuple[float, torch.Tensor]:
            # Per source: loss summed, tokens counted; and one place more for "stop" and "save".
            sums = torch.zeros(2, num_sources + 1, dtype=torch.float64)
            if self._mesh.tensor.rank == 0:  # the first of a tensor group speaks for its windows; to stop any may ask
                for of_windows, losses in by_window.values():
                    sums[0].index_add_(0, of_windows, losses.cpu())
            if self._mesh.speaks_for_windows:
                sums[1].index_add_(0, sources, counts.to(sums.dtype))
            sums[0, -1], sums[1, -1] = float(stop_asked), float(save_asked)
            sums = self._mesh.sum(sums.to(self._mesh.device)).cpu()
            return float(sums[0, :-1].sum() / sums[1, :-1].sum().clamp(min=1)), sums

        self._was_refused = False
        self._is_refused = (lambda norm: self._mesh.any(is_bad(sum_over_ranks()[0], norm))) if is_bad else None
        self._train(micro_batches, loss_of)
        loss, sums = sum_over_ranks()
        summed = [losses for _, losses in by_window.values()]  # none on the parts of a pipeline without the head
        self._sums_of_windows = torch.cat(summed) if summed else torch.zeros(len(counts))
        self._counts_of_windows = counts
        return StepResult(
            loss=loss,
            loss_by_source={i: float(sums[0, i] / sums[1, i]) for i in range(num_sources) if sums[1, i] > 0},
            grad_norm=self._gradient_norm(),
            skipped=not self._engine.was_step_applied(),
            stop_asked=bool(sums[0, -1] > 0),
            save_asked=bool(sums[1, -1] > 0),
        )

    def window_losses(self) -> torch.Tensor:
        """Loss of each window of the last step, the mean over its targets that count, 0 if none does.

        [B of all ranks] float64, on the CPU, in the order of the batch; collective, and the same on all ranks.
        """
        sums = torch.zeros(2, self._mesh.data_size, len(self._counts_of_windows), dtype=torch.float64)
        if self._mesh.tensor.rank == 0:
            sums[0, self._mesh.data_rank] = self._sums_of_windows.cpu()
        if self._mesh.speaks_for_windows:
            sums[1, self._mesh.data_rank] = self._counts_of_windows.double()
        sums = self._mesh.sum(sums.to(self._mesh.device)).cpu()
        return (sums[0] / sums[1].clamp(min=1)).flatten()

    def use_model_settings(self, settings: Any) -> None:
        """Let the model compute with other rotary positions from now on; shapes must be the same."""
        self._model.settings = settings

    def warm(self, tokens: torch.Tensor, sources: torch.Tensor, starts: torch.Tensor | None = None) -> None:
        """A step at learning rate 0, which no method takes part in: weights stay, AdamW's moments fill.

        The arguments are those of `step`.
        """
        methods, self._methods = self._methods, ()
        try:
            self.step(tokens, torch.zeros_like(sources), 1, 0.0, Progress(), starts=starts)
        finally:
            self._methods = methods

    def score(self, tokens: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        """Loss of each window of `tokens` [B, S + 1] on this rank, summed over its targets: [B] float64, on CPU.

        `starts` is as in `step`; how many targets count then is for the caller to know.
        """
        return self.token_losses(tokens, starts).sum(dim=1, dtype=torch.float64)

    def token_losses(self, tokens: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        """Loss of each target of the windows `tokens` [B, S + 1] on this rank: [B, S] fp32, on CPU; as `score`."""
        return self._run.token_losses(tokens, starts).cpu()

    def end_stage(self, progress: Progress) -> None:
        """Tell the methods that a stage has ended."""
        changed = [method.end_stage(self.masters, progress) for method in self._methods]
        if any(changed):
            self.masters.refresh()

    def differing_copies(self) -> list[str]:
        """Parameters that some rank holds otherwise than the others that should hold the same; the same on all."""
        found = self.masters.differing_copies() + self._run.differing_copies()
        return found or ["one on another rank"] if self._mesh.any(bool(found)) else []

    def report(self) -> dict[str, float]:
        """What the methods have to tell about the last step, for `metrics.jsonl`; with fp16 the loss scale too."""
        told = {key: value for method in self._methods for key, value in method.report().items()}
        return {**(self._loss_scale.report() if self._loss_scale else {}), **told}

    def content(self, state: dict[str, Any]) -> Content:
        """What a checkpoint holds now, with `state` beside it: views, which the next step changes."""
        pieces = self.masters.pieces
        tensors = {"master": [p.values for p in pieces]}
        tensors.update({moment: [p.moments[moment] for p in pieces] for moment in MOMENTS})
        numbers: dict[str, Any] = {}
        for method in self._methods:
            for key, value in method.state_dict().items():
                into = tensors if isinstance(value, list) else numbers
                into[f"method/{method.name}/{key}"] = value
        whole = {**state, "optimizer_updates": self.masters.num_updates, "methods": numbers}
        if self._loss_scale:
            whole["loss_scale"] = self._loss_scale.state_dict()
        return Content(pieces, tensors, whole)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write masters, moments and method state by name, with `state` beside them, into the new folder `folder`."""
        write_checkpoint(folder, self.content(state), self._mesh)

    def load(self, checkpoint: Checkpoint, *, with_optimizer: bool, with_methods: bool) -> None:
        """Take weights from a checkpoint of any mesh; moments and method state too where asked."""
        faults = checkpoint.misfits(self.masters.shapes)
        if with_optimizer and not set(MOMENTS) <= set(checkpoint.kinds):
            faults.append(
                f"{checkpoint.folder} holds no moments to keep: an imported model has none; use optimizer_state: reset"
            )
        with together(self._mesh):
            if faults:
                raise Fault(faults)
        self.fill(partial(checkpoint.read, "master"))
        if with_optimizer:
            for moment in MOMENTS:
                self.masters.fill(partial(checkpoint.read, moment), moment)
            self.masters.num_updates = checkpoint.state["optimizer_updates"]
            if self._loss_scale and "loss_scale" in checkpoint.state:
                self._loss_scale.load_state_dict(checkpoint.state["loss_scale"])
        if with_methods:
            for method in self._methods:
                self._load_method(method, checkpoint)

    def _expect(self, num_micro_batches: int) -> None:
        """Let DeepSpeed make its update after so many, where the batch has grown."""
        engine = self._engine
        if num_micro_batches != engine.gradient_accumulation_steps():
            size = engine.train_micro_batch_size_per_gpu() * engine.dp_world_size
            engine.set_train_batch_size(num_micro_batches * size)
            engine.micro_steps = 0  # of which every multiple of the number ends a step
            engine.optimizer.gradient_accumulation_steps = num_micro_batches  # ZeRO has a copy of its own

    def _mean_count(self, counts: torch.Tensor, num_micro_batches: int) -> torch.Tensor:
        """Targets that count in a micro-batch, the mean over all of the step; above 0. On the device: nothing waits.

        What a micro-batch's losses are divided by: DeepSpeed takes the mean over micro-batches and ranks, and each
        weighs the same there, however many of its own targets count.
        """
        total = self._mesh.sum_over_data(counts.sum().double().to(self._mesh.device))
        return total.clamp(min=1) / (num_micro_batches * self._mesh.same_parameters.size)

    def _load_method(self, method: Seams, checkpoint: Checkpoint) -> None:
        prefix = f"method/{method.name}/"
        state: dict[str, Any] = {
            key.removeprefix(prefix): value
            for key, value in checkpoint.state["methods"].items()
            if key.startswith(prefix)
        }
        for kind in checkpoint.kinds:
            if kind.startswith(prefix):
                state[kind.removeprefix(prefix)] = [
                    piece.take(partial(checkpoint.read, kind)).to(piece.values.device) for piece in self.masters.pieces
                ]
        method.load_state_dict(state)

    def _update_between_seams(self, *arguments: Any, **named: Any) -> None:
        if self._loss_scale and self._engine.optimizer.has_overflow():
            self._update(*arguments, **named)  # which finds the same, and lets go of the gradients
            return
        if self._is_refused is not None:
            norm = self._norm_before_update()
            self._was_refused = self._is_refused(norm)
            if self._was_refused:
                leave_out(self._engine.optimizer, lambda: self._update(*arguments, **named))
                self._engine.optimizer._global_grad_norm = norm  # it says infinite
                return
        for method in self._methods:
            method.before_update(self.masters, self._progress)
        if self._settings.zero == 0 and not self._clip_whole_gradients():
            return
        self._update(*arguments, **named)
        if getattr(self._engine.optimizer, "overflow", False):
            return
        changed = [method.after_update(self.masters, self._progress) for method in self._methods]
        if any(changed):
            self.masters.refresh()

    def _clip_whole_gradients(self) -> bool:
        """Clip as DeepSpeed does at the other stages; False, and the update is left out, if the norm is not finite."""
        norm = self._whole_norm()
        self._clipped_norm = float(norm)
        self._engine.optimizer.overflow = not math.isfinite(self._clipped_norm)
        if self._settings.optimizer.clip and not self._engine.optimizer.overflow:
            scale = self._settings.optimizer.clip / (norm + 1e-6)
            if scale < 1:
                torch._foreach_mul_([p.grad for p in self._model.parameters() if p.grad is not None], scale)
        return not self._engine.optimizer.overflow

    def _whole_norm(self) -> torch.Tensor:
        """At stage 0, of all gradients; each counts once."""
        with_gradient = [p for p in self._model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if is_counted(p, self._mesh)])
        for group in (self._mesh.tensor, self._mesh.pipeline):
            if group.size > 1:
                norm = norm.square()
                torch.distributed.all_reduce(norm, group=group.handle)
                norm = norm.sqrt()
        return norm

    def _norm_before_update(self) -> float:
        """What `_gradient_norm` will say."""
        if self._settings.zero == 0:
            self._clipped_norm = float(self._whole_norm())
            return self._clipped_norm
        scale = self._loss_scale.used if self._loss_scale else 1.0
        return norm_before_update(self._engine.optimizer) / scale

    def _gradient_norm(self) -> float:
        return self._clipped_norm if self._settings.zero == 0 else float(self._engine.get_global_grad_norm())
