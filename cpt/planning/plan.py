"""A run read through without training: stages, sources and their epochs, learning rate, memory, disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from cpt.checkpoint import Place, RunFolder, keep
from cpt.config import Fault, beside, build, name_of_choice
from cpt.data.check import open_corpora
from cpt.data.order import StageOrder
from cpt.data.share_table import share_table
from cpt.models.layers.cutting import num_parameters_on_a_rank
from cpt.planning.memory import model_state
from cpt.progress import Progress
from cpt.run import Run
from cpt.run.beginning import checkpoint_of_parent, place_of_child
from cpt.run.stages import corpora_of, last_rate, order_of, refuse_bad_stages

_BARS = " ▁▂▃▄▅▆▇█"


def plan_lines(run: Run, num_ranks: int) -> Iterator[str]:
    """The plan of `run` on `num_ranks`, a line at a time. Raises Fault with everything that cannot work."""
    if num_ranks < 1:
        raise Fault(f"--ranks = {num_ranks}: at least 1")
    RunFolder(run.output).refuse_other_contents()
    faults = run.faults_on(num_ranks)
    try:
        open_corpora(corpora_of(run), run.model.vocabulary, run.tokenizer, run.is_within_documents)
    except Fault as fault:
        faults.extend(fault.lines)
    if faults:
        raise Fault(faults)
    place = place_of_child(run, checkpoint_of_parent(run).state) if run.parent else Place()
    refuse_bad_stages(run, place)
    yield from _model_lines(run, num_ranks)
    for index, stage in enumerate(run.stages):
        order = order_of(run, place)
        yield ""
        yield from _stage_lines(run, index, order, place.rate_before_stage)
        last = last_rate(run, index, place.rate_before_stage)
        place = dataclasses.replace(place, rate=last).at_next_stage(order.ledger_after(run.num_slots(stage)))


def _model_lines(run: Run, num_ranks: int) -> Iterator[str]:
    number = run.model.num_parameters
    methods = [build(method, "Method") for method in run.methods]
    copies = sum(method.num_copies for method in methods if not method.are_copies_on_host)
    copies_on_host = sum(method.num_copies for method in methods if method.are_copies_on_host)
    whole_copies = sum(method.num_whole_copies for method in methods)
    mesh, num_data, parts = run.mesh, run.mesh.data_size(num_ranks), run.blocks_of_parts
    here = num_parameters_on_a_rank(run.model, beside(run.model, "CUTS"), mesh.tensor, parts)
    num_replicas = num_data * mesh.sequence
    state = model_state(here, run.precision, run.zero, num_replicas, copies, whole_copies)
    micro_batch = run.batch.micro_batch_on(num_data)
    accumulation = run.batch.windows_a_rank(num_data) // micro_batch
    yield f"model       {name_of_choice(run.model)}, {number:,} parameters, {run.precision}, ZeRO {run.zero}"
    yield (
        f"a step      {run.batch.windows} windows of {run.sequence_length} = {run.tokens_a_step:,} tokens; "
        f"on {num_ranks} rank(s) {accumulation} micro-batch(es) of {micro_batch}"
    )
    if mesh.ranks_of_a_replica > 1:
        yield f"mesh        {mesh.told(num_ranks)}, {here:,} parameters on a rank"
    if mesh.pipeline > 1:
        idle = (mesh.pipeline - 1) / (accumulation + mesh.pipeline - 1)
        told = ", ".join(str(len(blocks)) for blocks in parts)
        yield f"pipeline    parts of {told} blocks; each waits {idle:.0%} of a step with {accumulation} micro-batch(es)"
    yield f"the run     {sum(map(run.num_steps, run.stages)):,} steps, {run.total_tokens:,} tokens"
    told = ", ".join(f"{part} {_size(num_bytes)}" for part, num_bytes in vars(state).items())
    yield f"memory      {_size(state.total)} a rank for the model's state ({told}); activations come on top"
    if copies_on_host:
        on_host = model_state(here, run.precision, run.zero, num_replicas, copies_on_host).methods
        yield f"host        {_size(on_host)} a rank for what methods keep there"
    yield from _checkpoint_lines(run, num_ranks)


def _checkpoint_lines(run: Run, num_ranks: int) -> Iterator[str]:
    """What checkpoints take of the disk, and a copy of one of the hosts' memory."""
    kept, num_bytes = run.checkpoint, run.num_bytes_of_checkpoint
    if kept.in_background:
        yield f"host        {_size(num_bytes / num_ranks)} a rank for the copy that is written in the background"
    num_for_ever = run.total_tokens // kept.keep_every_tokens if kept.keep_every_tokens else 0
    num_for_ever += sum(tokens <= run.total_tokens for tokens in kept.keep_at_tokens)
    told = f"the last {kept.keep_last} are kept"
    if num_for_ever:
        told += f", and {num_for_ever} for ever"
    if kept.temporary_every_minutes:
        told += ", and one temporary"
    num_at_once = kept.keep_last + num_for_ever + bool(kept.temporary_every_minutes) + 1
    free = keep.free_bytes(RunFolder(run.output).checkpoints)
    told += f"; up to {_size(num_at_once * num_bytes)} with the one being written, {_size(free)} are free"
    yield f"disk        {_size(num_bytes)} a checkpoint, {told}"


def _size(num_bytes: float) -> str:
    """`3.2 MiB`, `14.9 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _stage_lines(run: Run, index: int, order: StageOrder, rate_before: float) -> Iterator[str]:
    stage = run.stages[index]
    num_steps = run.num_steps(stage)
    yield f"stage {stage.name}: {num_steps:,} steps"
    yield from (f"  {line}" for line in share_table(order, run.num_slots(stage)))
    schedule = build(stage.schedule, "Schedule", stage.total_tokens, rate_before)
    rates = [
        schedule.rate(Progress(stage=index, stage_tokens=run.num_slots(stage) * column // 59 * run.sequence_length))
        for column in range(60)
    ]
    top = max(rates) or 1.0
    told = f"{rates[0]:.2e} first, {top:.2e} highest, {rates[-1]:.2e} last"
    yield f"  learning rate ({name_of_choice(stage.schedule)}): {told}"
    yield f"  {_curve(rates)}"
    if stage.batch_warmup:
        places = [Progress(stage=index, stage_tokens=stage.total_tokens * column // 60) for column in range(60)]
        tokens = stage.batch_warmup.tokens.tokens_of(stage.total_tokens)
        yield f"  batch: {stage.batch_warmup.windows} windows first, {run.batch.windows} from {tokens:,.0f} tokens on"
        yield f"  {_curve([run.windows_at(stage, place) for place in places])}"
    if stage.replay and run.raise_replay.forgetting:
        least, most = (f"{float(100 * share):.4g}%" for share in (stage.replay.share, run.raise_replay.at_most))
        of_what = " or ".join(limit.source for limit in run.raise_replay.forgetting)
        told = f"from {least} to {most}, with as many fewer new tokens, while more of {of_what} is forgotten"
        yield f"  replay may rise {told}"


def _curve(values: Sequence[float]) -> str:
    """A bar for each value, the highest a whole one."""
    top = max(values) or 1.0
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)
