"""Where a run stands between two steps, beside weights and optimiser."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cpt.config import Fault
from cpt.lineage import chain
from cpt.lineage.areas import Areas
from cpt.lineage.ledger import Ledger, ShareChange, Skipped, Stop, as_inherited
from cpt.progress import Progress


@dataclass(frozen=True)
class StageBehind:
    """The stage that ended last: its tokens, and the lineage's ledger when it began."""

    tokens: int
    ledger_before: Ledger

    def as_json(self) -> dict[str, Any]:
        """For `state.json`."""
        return {"tokens": self.tokens, "ledger_before": self.ledger_before.as_json()}


@dataclass(frozen=True)
class Place:
    """What `state.json` of a checkpoint holds of the run. `rate`: learning rate of the last step. `areas`: of this
    run's steps.

    The ledger is kept as it was when the stage began, because the order of the stage is a function of that; so is the
    one of the stage before, and how long that was, for a child that goes on with it from its end.
    Stops by `stop_if` are added to it at once: no order depends on them.
    `continued`: where in a stage of its parent a run began that goes on with that stage's windows.
    `share_changes`: of replay in the stage so far. The ledger holds them, so `state.json` has them there.
    `skipped`: windows of the stage that nothing is learned from, also those to come, likewise.
    """

    progress: Progress = Progress()
    ledger_before_stage: Ledger = Ledger()
    rate_before_stage: float = 0.0
    rate: float = 0.0
    chain: str = chain.START
    areas: Areas = Areas()
    stage_behind: StageBehind | None = None
    continued: Progress | None = None
    share_changes: tuple[ShareChange, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @property
    def all_skipped(self) -> tuple[Skipped, ...]:
        """Of the whole lineage."""
        return (*self.ledger_before_stage.skipped, *self.skipped)

    def after_step(self, num_tokens: int, rate: float, chain_after: str) -> Place:
        """The place after one more step of the stage."""
        progress, areas = self.progress.after_step(num_tokens), self.areas.after_step(rate)
        return dataclasses.replace(self, progress=progress, rate=rate, chain=chain_after, areas=areas)

    def at_next_stage(self, ledger: Ledger) -> Place:
        """The same place as the beginning of the next stage; `ledger` is the lineage's now."""
        return dataclasses.replace(
            self,
            progress=self.progress.at_next_stage(),
            ledger_before_stage=ledger,
            rate_before_stage=self.rate,
            stage_behind=StageBehind(self.progress.stage_tokens, self.ledger_before_stage),
            share_changes=(),
            skipped=(),
        )

    def with_skipped(self, *skipped: Skipped) -> Place:
        """The same place, with further windows of the stage that nothing is learned from; those it knows count once."""
        new = [one for one in skipped if one not in self.skipped]
        return dataclasses.replace(self, skipped=(*self.skipped, *new))

    def stopped_by(self, stop: Stop) -> Place:
        """The same place with `stop` in the lineage's ledger; as it is, if that knows of it."""
        return dataclasses.replace(self, ledger_before_stage=self.ledger_before_stage.with_stop(stop))

    def recorded_in(self, ledger: Ledger) -> Ledger:
        """The lineage's ledger here, from what it has consumed: with what guards have decided in this stage."""
        before = self.ledger_before_stage
        changes = (*before.share_changes, *self.share_changes)
        return dataclasses.replace(ledger, share_changes=changes, stops=before.stops, skipped=self.all_skipped)

    def as_json(self, ledger: Ledger) -> dict[str, Any]:
        """For `state.json`; `ledger` is the lineage's at this place."""
        return {
            "progress": dataclasses.asdict(self.progress),
            "ledger": ledger.as_json(),
            "ledger_before_stage": self.ledger_before_stage.as_json(),
            "rate_before_stage": self.rate_before_stage,
            "rate": self.rate,
            "chain": self.chain,
            "areas": dataclasses.asdict(self.areas),
            "stage_behind": self.stage_behind and self.stage_behind.as_json(),
            "continued": self.continued and dataclasses.asdict(self.continued),
        }

    @staticmethod
    def from_json(state: dict[str, Any]) -> Place:
        """The place that a checkpoint was saved at."""
        ledger = Ledger.from_json(state["ledger_before_stage"])
        rates = state["rate_before_stage"], state["rate"]
        areas = Areas(**state.get("areas", {}))  # earlier versions had none, nor what follows
        behind, continued = state.get("stage_behind"), state.get("continued")
        now = Ledger.from_json(state["ledger"])
        return Place(
            Progress(**state["progress"]),
            ledger,
            *rates,
            state["chain"],
            areas,
            StageBehind(behind["tokens"], Ledger.from_json(behind["ledger_before"])) if behind else None,
            Progress(**continued) if continued else None,
            _changes_since(ledger, now),
            _skipped_since(ledger, now),
        )

    @staticmethod
    def of_child(state: dict[str, Any]) -> Place:
        """The first place of a run whose parent was saved at `state`."""
        rate = state["rate"]
        ledger = Ledger.from_json(state["ledger"]).as_inherited()
        return Place(ledger_before_stage=ledger, rate_before_stage=rate, rate=rate, areas=Areas(rate=rate))

    def going_on_with_stage_of(self, above: Place, num_stages_above: int) -> Place:
        """This first place of a child, if its first stage goes on with the one in which its parent stood at `above`.

        At the end of the parent, whose stages are so many, that is its last one. Raises Fault if it cannot be known.
        """
        origin, ledger, changes, skipped = above.progress, above.ledger_before_stage, above.share_changes, above.skipped
        if origin.stage == num_stages_above:
            if above.stage_behind is None:
                raise Fault(
                    "stages.0.continues: the parent's last checkpoint is of a version that did not keep how its last "
                    "stage began; name an earlier step of the parent, or leave continues out"
                )
            ledger = dataclasses.replace(above.stage_behind.ledger_before, stops=ledger.stops)
            changes = _changes_since(ledger, above.ledger_before_stage)
            skipped = _skipped_since(ledger, above.ledger_before_stage)
            origin = Progress(stage=origin.stage - 1, stage_tokens=above.stage_behind.tokens)
        if above.continued and origin.stage == 0:
            tokens = above.continued.stage_tokens + origin.stage_tokens
            origin = dataclasses.replace(above.continued, stage_tokens=tokens)
        continued = Progress(stage=origin.stage, stage_tokens=origin.stage_tokens)
        ledger = dataclasses.replace(ledger, skipped=as_inherited(ledger.skipped))
        return dataclasses.replace(
            self, ledger_before_stage=ledger, continued=continued, share_changes=changes, skipped=as_inherited(skipped)
        )


def _changes_since(before: Ledger, now: Ledger) -> tuple[ShareChange, ...]:
    """What replay's share has become in the stage that began with the ledger `before`."""
    return now.share_changes[len(before.share_changes) :]


def _skipped_since(before: Ledger, now: Ledger) -> tuple[Skipped, ...]:
    """What nothing is learned from of the stage that began with the ledger `before`."""
    return now.skipped[len(before.skipped) :]
