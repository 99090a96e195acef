"""Train a run or a version plan, or go on where it stopped; one process, or as many as a launcher starts."""

from __future__ import annotations

import argparse
import os
import socket
import sys

from cpt.config import Fault, as_mapping
from cpt.observe.attempts import note_end_before_start
from cpt.observe.logs import keep_in_file, log_to_terminal
from cpt.parallel.health import check_health
from cpt.parallel.mesh import num_gpus, open_mesh
from cpt.parallel.together import OtherRankError
from cpt.run import read_run
from cpt.train import TrainingError, train
from cpt.versions import read_versions, train_versions
from cpt_launcher.launchers import find_launchers
from cpt_launcher.rendezvous import find_rendezvous, pick_free_port

EXAMPLE = "cpt train configs/quickstart/base.yaml seed=2 output=runs/seed2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `cpt train`."""
    parser.add_argument("settings", nargs="+", metavar="CONFIG|key=value", help="YAML files, then key=value words")
    # DeepSpeed's launcher adds this word to every script it starts.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Train; every rank of a launcher comes here."""
    launchers = find_launchers(os.environ)  # first of all: what has ended before cannot be missed later
    place = find_rendezvous(os.environ, arguments.local_rank, pick_free_port)
    log_to_terminal(place.rank)
    # All ranks find the same faults in the settings, and the first one tells; what comes later a rank may find alone.
    is_everybodys, has_met = True, False
    settings = None
    try:
        plan = read_versions(arguments.settings)
        settings = plan.main if plan else read_run(arguments.settings)
        if faults := settings.faults_on(place.world_size):
            raise Fault(faults)
        is_everybodys = False  # why a rank cannot meet the others, only it can tell
        num_devices = num_gpus()
        with open_mesh(
            settings.mesh,
            rank=place.rank,
            size=place.world_size,
            local_rank=place.device_index(num_devices) if num_devices else place.local_rank,
            local_size=place.local_world_size,
            address=place.master_address,
            port=place.master_port,
            start=f"{place.start} with output = {settings.output}",
            watch=settings.watch,
        ) as mesh:
            has_met = True
            as_read = as_mapping(plan or settings)
            check_health(mesh, settings.health, as_read, settings.output, settings.num_bytes_of_checkpoint)
            if plan:
                outcome = train_versions(plan, mesh, launchers.why_gone, place.job)
            else:
                outcome = train(settings, mesh, launchers.why_gone, place.job)
    except TrainingError as error:
        keep_in_file([str(error)])
        if place.rank == 0:  # all ranks end with the same
            print(f"cpt train: {error}", file=sys.stderr)
        return 1
    except OtherRankError as error:
        keep_in_file([str(error)])
        return error.status
    except OSError as error:
        if has_met:
            keep_in_file([str(error)])
        raise
    except Fault as fault:
        if has_met:
            keep_in_file(fault.lines)
        # Where there is a folder already, a supervisor may want to know; launchers lose exit statuses.
        if fault.is_passing and settings and os.path.isdir(settings.output):
            where = {"rank": place.rank, "node": socket.gethostname()}
            note_end_before_start(settings.output, "; ".join(fault.lines), **where)
        if place.rank == 0 or not (is_everybodys or has_met):
            raise
        if has_met:
            lines = [f"rank {place.rank}: {line}" for line in fault.lines]
            raise Fault(lines, is_passing=fault.is_passing) from None
        return 1 if fault.is_passing else 2
    return 128 + outcome.signal if outcome.signal else 0
