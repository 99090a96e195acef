"""The SLURM job that a supervisor runs in: its nodes, its steps, and to be put back into the queue. Never raises.

A controller that does not answer is told in the log; training goes on without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from cpt_launcher import slurm
from cpt_launcher.rendezvous import number

_log = logging.getLogger(__name__)


class OwnJob:
    """The job around this process, as its environment tells; `name` is None outside of SLURM, where nothing is done."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.name = slurm.own_job(environment)
        self._nodes = environment.get("SLURM_JOB_NODELIST", "")
        self._num_nodes = number(environment, "SLURM_JOB_NUM_NODES", otherwise=1) if self.name else 0
        self._array = environment.get("SLURM_ARRAY_JOB_ID")

    def why_not_requeued(self) -> str | None:
        """Why the job should not be requeued; None if it can be.

        Only a job that is running: somebody's scancel must not be undone.
        """
        try:
            found = slurm.find_job(self.name)
        except slurm.SlurmError as error:
            return str(error)
        if found is None or found.state != "RUNNING":
            return f"job {self.name} is {found.state if found else 'not known to SLURM'}"
        return None

    def why_requeue_failed(self) -> str | None:
        """Requeue the job, which ends all of its processes; None if it is in the queue again, else why it is not."""
        try:
            slurm.requeue(self.name)
        except slurm.SlurmError as error:
            return str(error)
        return None

    def bad_nodes(self) -> str:
        """Why the job should not go on where it is; empty if its nodes are well, and outside of SLURM."""
        if self.name is None:
            return ""
        try:
            if bad := slurm.bad_nodes(self._nodes):
                return f"not well: {', '.join(bad)}"
            # A node that has just died is still well to the controller; who asks it to start something knows sooner.
            if self._num_nodes > 1 and (silent := slurm.why_no_step(self._num_nodes)):
                return f"a node of {self._nodes} starts nothing: {silent}"
        except slurm.SlurmError as error:
            _log.warning("%s", error)
        return ""

    def steps(self) -> set[str]:
        """The steps of the job that are there now."""
        try:
            return set(slurm.steps_left(self.name)) if self.name else set()
        except slurm.SlurmError as error:
            _log.warning("%s", error)
            return set()

    def kill_steps(self, steps: set[str]) -> None:
        """End so many steps at once."""
        for step in sorted(steps):
            try:
                slurm.kill_step(step)
            except slurm.SlurmError as error:
                _log.warning("%s", error)

    def wait_for_steps(self, but: set[str], until: float) -> None:
        """Return when no step is left `but` those; what is left at the time `until` (monotonic) is killed.

        A job that SLURM is about to end is left to it: the step of a dead node is there until the batch script ends.
        """
        while steps := self.steps() - but:
            if self._is_being_ended():
                return None
            if time.monotonic() > until:
                _log.warning("left behind by srun, and killed: step(s) %s", ", ".join(sorted(steps)))
                return self.kill_steps(steps)
            time.sleep(1.0)
        return None

    def _is_being_ended(self) -> bool:
        try:
            found = slurm.find_job(self.name)
        except slurm.SlurmError:
            return False
        return found is None or found.state != "RUNNING"

    def cancel_chain(self, chains: Sequence[Sequence[str]]) -> None:
        """Cancel the waiting jobs of the one of `chains` that this job belongs to: there is nothing left for them."""
        own = {self.name, self._array} - {None}
        if chain := next((chain for chain in reversed(chains) if own & set(chain)), None):
            try:
                slurm.cancel_waiting(list(chain))
            except slurm.SlurmError as error:
                _log.warning("the rest of the chain is not cancelled, its jobs end at once: %s", error)
