"""What a run leaves and says before its first step: its folder with the settings in full, and what was built."""

from __future__ import annotations

import logging
import shutil
from typing import Any

from cpt.checkpoint import RunFolder
from cpt.config import Fault, write_yaml
from cpt.data.corpus import Corpus
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.lineage import tree
from cpt.observe.attempts import note_attempt
from cpt.observe.journal import Journal
from cpt.observe.logs import log_to_file
from cpt.parallel.mesh import Mesh
from cpt.run.settings import Run
from cpt_kernels import switch
from cpt_kernels.cross_entropy import of_a_slice

_log = logging.getLogger(__name__)


def prepare_folder(run: Run, folder: RunFolder, parent: tree.Parent | None, corpora: list[Corpus]) -> None:
    """Make the folder with `run.yaml`, `lineage.json` and the tokenizer."""
    folder.make()
    # First: it makes the folder a run's. What comes after is made again if the run was ended in between.
    write_yaml(run, folder.path / "run.yaml", "Every setting of this run; cpt train FILE starts the same again.")
    if not (folder.path / "lineage.json").is_file():
        tree.write_lineage(folder.path, parent, run.weights)
    tokenizer = next((corpus.tokenizer for corpus in corpora if corpus.tokenizer), run.tokenizer)
    if tokenizer and not (folder.path / "tokenizer").is_dir():
        aside = folder.path / "tokenizer.aside"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        Tokenizer.open(tokenizer).copy_to(aside)
        aside.rename(folder.path / "tokenizer")


def settle_folder(
    run: Run, mesh: Mesh, folder: RunFolder, parent: tree.Parent | None, corpora: list[Corpus], journal: Journal
) -> None:
    """What no checkpoint may be without is in the folder: its settings, and every line told so far.

    A folder that was deleted under the run is made again: the weights are still here, and worth more than the guess
    that somebody wanted to be rid of them. Every rank may call it. Raises OSError if the disk does not take it.
    """
    if mesh.is_first and not folder.is_run:
        _log.warning(
            "%s was deleted while this run writes to it: it is made again, with its settings and the lines of all "
            "steps; logs and checkpoints from before are lost. To end the run, stop its job", folder.path,
        )  # fmt: skip
        try:
            prepare_folder(run, folder, parent, corpora)
        except Fault as fault:
            raise OSError("; ".join(fault.lines)) from None
        log_to_file(folder.path, mesh.rank)
        # Of this attempt, which may not end without having begun.
        note_attempt(folder.path, "started", step=mesh.watch.steps_done, ranks=mesh.size, nodes=[], job=None, attempt=1)
    journal.settle()


def tell_what_was_built(run: Run, mesh: Mesh, model: Any, kernels: switch.Kernels, compiled: str, peak: str) -> None:
    """Log the mesh, the batch, the kernels and what the MFU is told against."""
    accumulation = run.batch.windows_a_rank(mesh.data_size) // run.batch.micro_batch_on(mesh.data_size)
    _log.info(
        "%d parameters, %s, ZeRO %d on %d rank(s) of %s, %s; a step is %d windows of %d tokens, "
        "%d micro-batch(es) a rank",
        model.num_parameters(), run.precision, run.zero, mesh.size, mesh.device.type, run.mesh.told(mesh.size),
        run.batch.windows, run.sequence_length, accumulation,
    )  # fmt: skip
    if mesh.pipeline.size > 1:
        told = ", ".join(str(len(blocks)) for blocks in run.blocks_of_parts)
        _log.info("the pipeline's parts have %s blocks; the last one has the head too", told)
    has_copies = mesh.tensor.size > 1 or mesh.pipeline.size > 1 or (mesh.size > 1 and run.zero < 3)
    if run.mesh.check_every_steps and mesh.is_first and not has_copies:
        _log.warning(
            "mesh.check_every_steps = %d with zero = %d on %d rank(s): no rank holds what another one holds; "
            "nothing is compared", run.mesh.check_every_steps, run.zero, mesh.size,
        )  # fmt: skip
    told = kernels.told
    if mesh.tensor.size > 1:
        is_shared = run.mesh.shares_norms(run.sequence_length)
        _log.info("norms and residual stream: %s on each tensor rank", "some positions" if is_shared else "whole")
        slices = of_a_slice(kernels.linear_cross_entropy).name
        told = {**told, "cross_entropy": f"vocabulary-parallel (always, with mesh.tensor), {slices} on each slice"}
    told = "; ".join(f"{operation}: {twin}" for operation, twin in told.items())
    _log.info("kernels on %s: %s", kernels.here, told)
    if run.recompute.mode != "none" or run.compile.blocks:
        blocks = "all blocks" if run.recompute.blocks is None else f"the first {run.recompute.blocks} block(s)"
        _log.info("computed again in the backward pass: %s in %s; compiled: %s", run.recompute.mode, blocks, compiled)
    _log.info("MFU is told against %s, causal FLOP count", peak)
