"""Submit a run to SLURM: check the request, copy code and settings, write the sbatch file, hand it to sbatch.

The job saves before its time limit and goes on until the run is finished; docs/CLUSTER.md has the whole story.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from pathlib import Path

from cpt.checkpoint import RunFolder
from cpt.config import Fault, read_mapping, write_yaml
from cpt.config.yaml_text import to_yaml
from cpt.data.check import open_corpora
from cpt.observe.attempts import note_attempt, read_attempts
from cpt.run import Run, read_run
from cpt.run.beginning import began_with, refuse_bad_beginning
from cpt.run.stages import corpora_of
from cpt.versions import read_versions
from cpt_launcher import slurm
from cpt_launcher.snapshot import code_folder, next_snapshot, snapshot
from cpt_launcher.submission import TEMPLATE, Request, render

EXAMPLE = "cpt submit my.yaml seed=2 --nodes 2 --gpus-per-node 8 --partition gpu --time 24:00:00 --dry-run"

_END_SECONDS = 60  # in which ranks that have missed one write stacks and messages, and end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `cpt submit`."""
    parser.add_argument("settings", nargs="+", metavar="CONFIG|key=value", help="YAML files, then key=value words")
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="machines; default: 1")
    add("--min-nodes", type=int, metavar="N", help="begin on as few as so many, if there are no more; default: --nodes")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs of each machine, with one task each")
    add("--tasks-per-node", type=int, metavar="N", help="ranks on each machine; default: --gpus-per-node, or 1")
    add("--cpus-per-task", type=int, metavar="N", help="CPU cores of each rank")
    add("--partition", metavar="P", help="queue of the job; default: the cluster's")
    add("--account", metavar="A", help="account that its hours are charged to; default: yours")
    add("--qos", metavar="Q", help="quality of service, which gives limits and priority; default: the account's")
    add("--constraint", metavar="C", help="features that the machines must have")
    add("--time", metavar="TIME", help="time limit of a job, such as 24:00:00; default: the partition's")
    add("--grace", type=int, default=300, metavar="SECONDS", help="time to save in before the limit; default: 300")
    add("--repeat", choices=("requeue", "chain", "array"), default="requeue", help="who goes on when the time is over: "
        "the same job (default), --jobs jobs that wait for one another, or an array of them")  # fmt: skip
    add("--jobs", type=int, default=1, metavar="N", help="length of the chain or array")
    add("--restarts", type=int, default=3, metavar="N", help="failures without a newer checkpoint that are followed by "
        "another start; default: 3")  # fmt: skip
    add("--interface", metavar="IF", help="network interface between the machines, such as ib0; default: found")
    add("--name", metavar="NAME", help="of the job; default: that of the run's folder")
    add("--option", action="append", default=[], metavar="OPTION", help="one more for sbatch: --option=--exclusive")
    add("--template", type=Path, default=TEMPLATE, metavar="FILE", help="another sbatch file with places to fill")
    add("--dry-run", action="store_true", help="print the sbatch file and the faults, and leave nothing behind")


def run(arguments: argparse.Namespace) -> int:
    """Submit, and print the job's number and how to look after it. Raises Fault with everything that cannot work."""
    plan = read_versions(arguments.settings)
    # The settings of a plan in full would be those of its runs: it goes as it was merged.
    text = to_yaml(read_mapping(arguments.settings)) if plan else None
    runs = [plan.main, *(release.run for release in plan.releases)] if plan else [read_run(arguments.settings)]
    settings, folder = runs[0], RunFolder(runs[0].output.absolute())
    _refuse_what_is_there(runs, folder.path)
    place = next_snapshot(folder.path)
    request = _request_of(arguments, settings, [run.output.absolute() for run in runs], place)
    script = render(request, arguments.template)
    if arguments.dry_run:
        code_folder()
        print(script, end="")
        return 0
    folder.make()
    (folder.path / "logs").mkdir(exist_ok=True)  # SLURM makes no folders for its logs
    with snapshot(place):
        if text is None:
            write_yaml(settings, request.config, "Every setting of this run, as it was submitted.")
        else:
            request.config.write_text(text, encoding="utf-8")
        (place / "job.sbatch").write_text(script, encoding="utf-8")
        jobs = _submit(request, place / "job.sbatch")
    print(f"submitted: job {', '.join(jobs)}; logs in {folder.path / 'logs'}")
    print(f"cpt status {shlex.quote(str(settings.output))}")
    return 0 if len(jobs) == request.num_submissions else 1


def _submit(request: Request, script: Path) -> list[str]:
    """Submit the script, for a chain again and again; the jobs' numbers, noted in the run's folder.

    Raises Fault if there is not one.
    """
    jobs: list[str] = []
    try:
        for _ in range(request.num_submissions):
            jobs.append(slurm.submit(str(script)))
    except slurm.SlurmError as error:
        if not jobs:
            raise Fault(f"{error}; --dry-run prints what would be submitted") from None
        print(f"cpt submit: only {len(jobs)} of {request.num_submissions} jobs: {error}", file=sys.stderr)
    for job in jobs:
        chain = jobs if request.repeat != "requeue" else []
        note_attempt(request.run, "submitted", job=job, nodes=request.nodes, repeat=request.repeat, chain=chain)
    return jobs


def _refuse_what_is_there(runs: list[Run], folder: Path) -> None:
    """Raise Fault if nothing is left to do, if somebody is at it, or if it could not begin or go on: the job would say
    so only after it has waited.
    """
    if all(RunFolder(run.output).is_finished for run in runs):
        raise Fault(f"output = {runs[0].output}: this run is finished; name another output")
    RunFolder(folder).refuse_other_contents()  # before data are looked for
    for run in runs[:1]:  # the branches of a plan take their data from its main path
        open_corpora(corpora_of(run), run.model.vocabulary, run.tokenizer, run.is_within_documents)
        refuse_bad_beginning(run)
    for run in runs[1:]:
        if (begun := RunFolder(run.output)).is_run:
            began_with(run, begun)
    for number in dict.fromkeys(e["job"] for e in read_attempts(folder) if e["event"] == "submitted"):
        try:
            job = slurm.find_job(number)
        except slurm.SlurmError:  # sbatch will say so, if it is asked at all
            return
        if job is not None and (job.is_waiting or job.is_running):
            raise Fault(f"output = {runs[0].output}: job {number} is {job.state} for this run; scancel {number} first")


def _request_of(arguments: argparse.Namespace, settings: Run, outputs: list[Path], place: Path) -> Request:
    """What is asked for. Raises Fault if the settings cannot be cut over ranks of a number of nodes it may get."""
    run = outputs[0]
    name = arguments.name or run.name
    if arguments.repeat == "chain" and arguments.name is None:
        # Jobs of a chain wait for those of their name: runs in folders of the same name must not wait for each other.
        name = f"{name}-{hashlib.sha256(str(run).encode(errors='surrogateescape')).hexdigest()[:6]}"
    request = Request(
        run=run, folder=Path.cwd(), code=place, config=place / "config.yaml", python=sys.executable, name=name,
        nodes=arguments.nodes, min_nodes=arguments.min_nodes,
        tasks_per_node=arguments.tasks_per_node or arguments.gpus_per_node or 1,
        gpus_per_node=arguments.gpus_per_node, cpus_per_task=arguments.cpus_per_task, partition=arguments.partition,
        account=arguments.account, qos=arguments.qos, constraint=arguments.constraint, time=arguments.time,
        grace=arguments.grace, repeat=arguments.repeat, jobs=arguments.jobs, restarts=arguments.restarts,
        interface=arguments.interface, options=tuple(arguments.option),
        wait_seconds=round(settings.watch.lost_seconds) + _END_SECONDS, more_runs=outputs[1:],
    )  # fmt: skip
    faults = request.faults()
    for nodes in range(max(request.fewest_nodes, 1), request.nodes + 1):
        ranks = nodes * request.tasks_per_node
        faults += [f"on {nodes} node(s), {ranks} rank(s): {fault}" for fault in settings.faults_on(ranks)]
    if faults:
        raise Fault(faults)
    return request
