"""Where a run stands between two steps, beside weights and optimiser."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cpt.lineage import chain
from cpt.lineage.areas import Areas
from cpt.lineage.ledger import Ledger
from cpt.progress import Progress


@dataclass(frozen=True)
class Place:
    """What `state.json` of a checkpoint holds of the run. `rate`: learning rate of the last step. `areas`: of this
    run's steps.

    The ledger is kept as it was when the stage began, because the order of the stage is a function of that.
    """

    progress: Progress = Progress()
    ledger_before_stage: Ledger = Ledger()
    rate_before_stage: float = 0.0
    rate: float = 0.0
    chain: str = chain.START
    areas: Areas = Areas()

    def after_step(self, num_tokens: int, rate: float, chain_after: str) -> Place:
        """The place after one more step of the stage."""
        progress, areas = self.progress.after_step(num_tokens), self.areas.after_step(rate)
        return dataclasses.replace(self, progress=progress, rate=rate, chain=chain_after, areas=areas)

    def at_next_stage(self, ledger: Ledger) -> Place:
        """The same place as the beginning of the next stage; `ledger` is the lineage's now."""
        return dataclasses.replace(
            self, progress=self.progress.at_next_stage(), ledger_before_stage=ledger, rate_before_stage=self.rate
        )

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
        }

    @staticmethod
    def from_json(state: dict[str, Any]) -> Place:
        """The place that a checkpoint was saved at."""
        ledger = Ledger.from_json(state["ledger_before_stage"])
        rates = state["rate_before_stage"], state["rate"]
        areas = Areas(**state.get("areas", {}))  # earlier versions had none
        return Place(Progress(**state["progress"]), ledger, *rates, state["chain"], areas)

    @staticmethod
    def of_child(state: dict[str, Any]) -> Place:
        """The first place of a run whose parent was saved at `state`."""
        rate = state["rate"]
        ledger = Ledger.from_json(state["ledger"]).as_inherited()
        return Place(ledger_before_stage=ledger, rate_before_stage=rate, rate=rate, areas=Areas(rate=rate))
