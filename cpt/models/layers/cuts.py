"""How a parameter is cut when a layer is spread over the ranks of a tensor group.

    column      dimension 0: each rank computes some of the outputs. Heads are cut whole; a bias is cut alike.
    row         dimension 1: each rank takes some of the inputs, and the outputs of all are added.
    vocabulary  dimension 0: each rank has some of the vocabulary's rows.
    whole       every rank has all of it: norms, and biases of what is cut by rows (to be added once, after the sum).

A model file holds a table `CUTS` from names, with `*` for the number of a block, to these words. Pipeline parts need no
table: they are cut between blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

Cut = Literal["column", "row", "vocabulary", "whole"]


def cut_of(name: str, cuts: Mapping[str, Cut]) -> Cut:
    """How the parameter `name` is cut by a model's table `CUTS`."""
    return cuts[re.sub(r"^blocks\.\d+\.", "blocks.*.", name)]
