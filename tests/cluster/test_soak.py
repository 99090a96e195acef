"""Fault upon fault, drawn by lot: the run ends as if there had been none, bit for bit, for its mesh never changes.

Two nodes of three, so that one is always left. Kinds of faults are drawn from a bag, each once before any comes again;
the time limit is among them.
"""

from __future__ import annotations

import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from cpt_harness import runs
from cpt_harness.slurm_cluster import ENDED, SlurmCluster
from cpt_harness.slurm_runs import SECONDS, SubmittedRun, write_slow_settings

# Seconds of faults; steps, which take longer with their rests, so that the run ends by its tokens when rests are over;
# and at most so many seconds of undisturbed training before a fault, where checkpoints come every five.
SHORT, LONG = (2 * 60, 400, 10.0), (20 * 60, 2600, 40.0)
REST, SEED = 0.5, 8
LIMIT_MINUTES = 20  # more than the time between two faults that begin the job anew


class Bag:
    """Kinds in an order drawn by lot, each once before any comes again."""

    def __init__(self, kinds: Sequence[str], lot: random.Random) -> None:
        self._kinds, self._lot, self._left = list(kinds), lot, []

    def draw(self) -> str:
        """The next one."""
        if not self._left:
            self._left = self._lot.sample(self._kinds, len(self._kinds))
        return self._left.pop()

    def give_back(self, kind: str) -> None:
        """It did not come to pass: it comes again when the others of this round have."""
        self._left.insert(0, kind)


def test_every_kind_comes_once_before_any_comes_again():
    bag = Bag("abcde", random.Random(SEED))
    rounds = [[bag.draw() for _ in "abcde"] for _ in range(20)]
    assert all(sorted(drawn) == list("abcde") for drawn in rounds)
    assert len({tuple(drawn) for drawn in rounds}) > 1


def test_a_kind_that_could_not_be_made_to_happen_comes_at_the_end_of_its_round():
    bag = Bag("abc", random.Random(SEED))
    bag.give_back(first := bag.draw())
    assert [bag.draw() for _ in "abc"][-1] == first


class Faults:
    """What can come upon a run. Each says whether it ends the attempt; None if it could not be made to happen."""

    def __init__(self, cluster: SlurmCluster, run: SubmittedRun, lot: random.Random) -> None:
        self.cluster, self.run, self.lot = cluster, run, lot

    def all(self) -> list[Callable[[], bool | None]]:
        return [self.node_crashes, self.node_loses_power, self.link_is_cut, self.link_fails_for_a_moment,
                self.rank_is_killed, self.rank_is_stopped, self.rank_hangs, self.slurmd_is_killed,
                self.controller_is_killed, self.job_is_requeued, self.job_is_preempted,
                self.time_limit_comes]  # fmt: skip

    def node_crashes(self) -> bool:
        self.cluster.crash(self._node())
        return True

    def node_loses_power(self) -> bool:
        self.cluster.power_off(self._node())
        return True

    def link_is_cut(self) -> bool:
        self.cluster.cut(self._node())
        return True

    def link_fails_for_a_moment(self) -> bool:
        node = self._node()
        self.cluster.cut(node)
        time.sleep(2)
        self.cluster.heal(node)
        return False

    def rank_is_killed(self) -> bool | None:
        return self._signal(signal.SIGKILL)

    def rank_is_stopped(self) -> bool | None:
        return self._signal(signal.SIGSTOP)

    def rank_hangs(self) -> bool:
        self.run.let_hang(self.lot.randrange(2))
        return True

    def slurmd_is_killed(self) -> bool:
        node = self._node()
        self.cluster.kill_slurmd(node)
        time.sleep(3)
        self.cluster.start_slurmd(node)
        return False

    def controller_is_killed(self) -> bool:
        self.cluster.kill_controller()
        time.sleep(5)
        self.cluster.start_controller()
        return False

    def job_is_requeued(self) -> bool:
        self.cluster.run("scontrol", "requeue", self.run.job)
        return True

    def job_is_preempted(self) -> bool:
        self.cluster.submit("-N3", "--exclusive", "-p", "high", "--wrap", "sleep 3")
        return True

    def time_limit_comes(self) -> bool:
        number = len(self.run.events("requeued"))
        hours, minutes, seconds = map(int, self.cluster.job(self.run.job)["RunTime"].split(":"))
        self._limit(math.ceil(hours * 60 + minutes + (seconds + 70) / 60))  # the signal comes a minute before
        event = self.run.wait_for_event("requeued", number + 1)
        assert "USR1" in event["reason"], event
        self._limit(LIMIT_MINUTES)
        return True

    def _limit(self, minutes: int) -> None:
        self.cluster.run("scontrol", "update", f"JobId={self.run.job}", f"TimeLimit={minutes}")

    def _node(self) -> str:
        return self.lot.choice(self.run.nodes())

    def _signal(self, number: signal.Signals) -> bool | None:
        node = self._node()
        if not self.cluster.processes(node, "launcher/run.py"):
            return None  # SLURM has taken it away in the meantime
        self.cluster.signal(node, number, "launcher/run.py")
        return True


def row_of(run: SubmittedRun, happened: Counter, seconds: float, steps: int) -> str:
    """A line of the fault table."""
    drawn = ", ".join(f"{number} x {name.replace('_', ' ')}" for name, number in sorted(happened.items()))
    share, starts = run.lost_tokens() / runs.TOKENS_A_STEP / steps, len(run.events("started"))
    lost = f"{run.lost_tokens():,} ({100 * share:.0f} % of the run)"
    return f"| {seconds / 60:.0f} minutes of faults | by lot: {drawn} | | | {starts} starts | {lost} | the same bits |"


@pytest.mark.parametrize(
    ("seconds", "steps", "pause"),
    [SHORT, pytest.param(*LONG, marks=pytest.mark.long)],
    ids=["short", "long"],
)
def test_a_run_under_a_storm_of_faults_ends_as_if_there_had_been_none(
    cluster, data, tmp_path, tell, seconds, steps, pause
):
    run = SubmittedRun(
        cluster, write_slow_settings(data, tmp_path, steps), "--nodes", 2, "--time", f"0:{LIMIT_MINUTES}:00",
        "--restarts", 10, rest=REST,
    )  # fmt: skip
    lot, happened = random.Random(SEED), Counter()
    faults = {fault.__name__: fault for fault in Faults(cluster, run, lot).all()}
    bag = Bag(list(faults), lot)
    run.wait_for_event("training")
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        time.sleep(lot.uniform(1, pause))
        assert cluster.job_state(run.job) not in ENDED, run.log()[-6000:]
        number = len(run.events("training"))
        kind = bag.draw()
        ends_attempt = faults[kind]()
        print(f"{time.monotonic() - began:6.0f} s, step {run.step()}: {kind.replace('_', ' ')}", flush=True)
        if ends_attempt is None:
            bag.give_back(kind)
            continue
        happened[kind] += 1
        if ends_attempt:
            run.wait_for_event("training", number + 1, 2 * SECONDS)
            cluster.mend()
    run.hurry()
    run.wait_until_finished(2 * SECONDS)
    if seconds == LONG[0]:
        assert set(happened) == set(faults)
        assert signal.SIGUSR1 in [event.get("signal") for event in run.events("ended")]  # the time limit's
    tell(row_of(run, happened, time.monotonic() - began, steps))
    (tmp_path / "undisturbed").mkdir()
    again = write_slow_settings(data, tmp_path / "undisturbed", steps)
    runs.trained(again, ranks=2, seconds=2 * SECONDS)
    runs.assert_same_but_for_checkpoints(runs.story(run.path), runs.story(tmp_path / "undisturbed" / "run"))
