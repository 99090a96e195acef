"""A model takes up a larger vocabulary: old rows stay as they are, bit for bit, new ones begin near what they replace.

    old tokenizer --pieces of each new token--> rows.py: new rows --behind the old ones--> weights.py: a model's weights

The logits of old tokens are then the ones they were, and a text cut into old tokens is still understood. Losses a token
of two tokenizers cannot be compared; bits per byte can.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpt.models.growth.rows import Init, grown_rows
from cpt.models.growth.weights import GrownWeights

__all__ = ["GrownWeights", "Growth", "Init", "grown_rows"]


@dataclass(frozen=True)
class Growth:
    """`grow_to`: a tokenizer that extends the one of the weights. `init`: how new rows begin, see rows.py.

    `train_new_rows_first`: for so many tokens of the run, all ranks together, only the new rows learn.
    """

    grow_to: Path
    init: Init = "mean_of_pieces"
    train_new_rows_first: int = 0

    def faults(self) -> list[str]:
        """A count below nothing."""
        if self.train_new_rows_first >= 0:
            return []
        return [f"train_new_rows_first = {self.train_new_rows_first}: a number of tokens; 0 trains all from the start"]
