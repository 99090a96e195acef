"""How far the mean loss of held-out text may lie from that of all text like it: an interval over documents.

Tokens of one document are alike, so that the tokens are no independent draws; documents are. The mean over all tokens
is the ratio of two sums over documents, summed losses over counted targets, and its variance is that of the ratio:

    R = sum l_d / sum n_d        variance = G / (G - 1) * sum (l_d - R n_d)^2 / (sum n_d)^2        G documents

Source: Cochran, Sampling Techniques, 3rd edition, section 9A (ratio estimate of a mean over clusters).
"""

from __future__ import annotations

import math

from torch import Tensor

CONFIDENCE = 0.95
_NORMAL = 1.959963984540054  # the normal distribution's quantile at 0.975


def half_width(losses: Tensor, counts: Tensor) -> float | None:
    """Half the width of the interval that holds the mean loss a token of all such text, 95 times in 100.

    `losses` and `counts` [G] float64: of each document, its losses summed and its targets counted; those without any
    are left out. None for fewer than two, which say nothing of how documents differ.
    """
    counted = counts > 0
    losses, counts = losses[counted], counts[counted]
    number = len(counts)
    if number < 2:
        return None
    total = counts.sum()
    residuals = losses - losses.sum() / total * counts
    variance = number / (number - 1) * float(residuals.square().sum() / total.square())
    return students_quantile(number - 1) * math.sqrt(variance)


def students_quantile(freedom: int) -> float:
    """Student's t at 0.975 for so many degrees of freedom, 1 or more; within 0.1 % of it from 4 on, 1 % at 3.

    Source: Abramowitz and Stegun 26.7.5 (expansion about the normal quantile); 1 and 2 are tabulated.
    """
    if freedom <= 2:
        return (12.7062047, 4.3026527)[freedom - 1]
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
