"""A run read through without training: stages, sources and their epochs, learning rate, memory, disk."""

from __future__ import annotations

from collections.abc import Iterator

from cpt.checkpoint import Place, RunFolder, find_checkpoint
from cpt.config import Fault, build, name_of_choice
from cpt.data.check import open_corpora
from cpt.data.order import StageOrder
from cpt.data.share_table import share_table
from cpt.parallel.seeds import derive_seed
from cpt.planning.memory import model_state
from cpt.progress import Progress
from cpt.run import Run, Stage

_BARS = " ▁▂▃▄▅▆▇█"


def plan_lines(run: Run, num_ranks: int) -> Iterator[str]:
    """The plan of `run` on `num_ranks`, a line at a time. Raises Fault with everything that cannot work."""
    if num_ranks < 1:
        raise Fault(f"--ranks = {num_ranks}: at least 1")
    RunFolder(run.output).refuse_other_contents()
    faults = run.batch.faults_on(num_ranks)
    place = Place()
    if run.parent:
        checkpoint = find_checkpoint(RunFolder(run.parent.run).checkpoints, run.parent.at)
        if checkpoint is None:
            raise Fault(f"parent.run = {run.parent.run} has no checkpoint")
        place = Place.of_child(checkpoint.state)
    paths = {f"stages.{s.name}.sources.{n}": source.corpus for s in run.stages for n, source in s.sources.items()}
    paths.update({f"evaluation.held_out.{n}": path for n, path in run.evaluation.held_out.items()})
    try:
        open_corpora(paths, run.model.vocabulary, run.tokenizer, run.is_within_documents)
    except Fault as fault:
        faults.extend(fault.lines)
    if faults:
        raise Fault(faults)
    yield from _model_lines(run, num_ranks)
    for index, stage in enumerate(run.stages):
        seed = derive_seed(run.seed, "stage", index)
        order = StageOrder(stage.sources, stage.replay, place.ledger_before_stage, run.sequence_length, seed)
        yield ""
        shortages = order.faults_over(run.num_slots(stage))
        if shortages:
            raise Fault(f"stages.{index}.{line}" for line in shortages)
        yield from _stage_lines(run, stage, order, place.rate_before_stage)
        last = build(stage.schedule, "Schedule", stage.total_tokens, place.rate_before_stage).rate(
            Progress(stage_tokens=run.num_steps(stage) * run.tokens_a_step - run.tokens_a_step)
        )
        place = Place(rate=last).at_next_stage(order.ledger_after(run.num_steps(stage) * run.batch.windows))


def _model_lines(run: Run, num_ranks: int) -> Iterator[str]:
    number = run.model.num_parameters
    copies = sum(build(method, "Method").num_copies for method in run.methods)
    state = model_state(number, run.precision, run.zero, num_ranks, copies)
    accumulation = run.batch.windows_a_rank(num_ranks) // run.batch.micro_batch_on(num_ranks)
    yield f"model       {name_of_choice(run.model)}, {number:,} parameters, {run.precision}, ZeRO {run.zero}"
    yield (
        f"a step      {run.batch.windows} windows of {run.sequence_length} = {run.tokens_a_step:,} tokens; "
        f"on {num_ranks} rank(s) {accumulation} micro-batch(es) of {run.batch.micro_batch_on(num_ranks)}"
    )
    yield f"the run     {sum(map(run.num_steps, run.stages)):,} steps, {run.total_tokens:,} tokens"
    told = ", ".join(f"{part} {_size(num_bytes)}" for part, num_bytes in vars(state).items())
    yield f"memory      {_size(state.total)} a rank for the model's state ({told}); activations come on top"
    yield f"disk        {_size(number * (12 + 4 * copies))} a checkpoint, {run.checkpoint.keep_last} are kept"


def _size(num_bytes: float) -> str:
    """`3.2 MiB`, `14.9 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _stage_lines(run: Run, stage: Stage, order: StageOrder, rate_before: float) -> Iterator[str]:
    num_steps = run.num_steps(stage)
    yield f"stage {stage.name}: {num_steps:,} steps"
    yield from (f"  {line}" for line in share_table(order, num_steps * run.batch.windows))
    schedule = build(stage.schedule, "Schedule", stage.total_tokens, rate_before)
    rates = [
        schedule.rate(Progress(stage_tokens=int(num_steps * column / 59) * run.tokens_a_step)) for column in range(60)
    ]
    top = max(rates) or 1.0
    curve = "".join(_BARS[round(rate / top * (len(_BARS) - 1))] for rate in rates)
    told = f"{rates[0]:.2e} first, {top:.2e} highest, {rates[-1]:.2e} last"
    yield f"  learning rate ({name_of_choice(stage.schedule)}): {told}"
    yield f"  {curve}"
