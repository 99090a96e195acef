"""Rows of an embedding or a head for new tokens, made of the rows of old ones.

V old tokens, N tokens in all, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Init = Literal["mean_of_pieces", "mean_and_covariance"]
# Of the covariance: the factor of transformers, where new rows are all but the mean and differ only to tell them apart.
SPREAD = 1e-9


def grown_rows(
    old_rows: Tensor, pieces: Sequence[Sequence[int]], init: Init, seed: int, *, rescaled: bool = False
) -> Tensor:
    """The old rows [V, D] bit for bit, then a row for each new token, [N, D] in fp32 on the CPU.

    pieces: the old ids that spelled each of the N - V new tokens; none where it had no spelling.

    mean_of_pieces: the mean of the rows of its pieces; of all old rows where it has none. `rescaled` gives each the
    median length of the old rows, as a mean is shorter than what it is a mean of: right for an input, which later
    layers know at that length. A head must have the plain mean: the logit of a new token is then the mean of its
    pieces' logits, so it is never likelier than the likeliest of them.
    mean_and_covariance: drawn from a Gaussian with the mean of the old rows and SPREAD times their covariance, by
    `seed` alone. A new token is then no likelier than an old one on average (Hewitt 2021, "Initializing new word
    embeddings for pretrained language models").
    """
    old_rows = old_rows.float().cpu()
    if not pieces:
        return old_rows
    new_rows = _means(old_rows, pieces) if init == "mean_of_pieces" else _draws(old_rows, len(pieces), seed)
    if rescaled and init == "mean_of_pieces":
        lengths = new_rows.norm(dim=1, keepdim=True)
        lengths[lengths == 0] = 1  # a mean of 0 has no direction; it stays 0
        new_rows = new_rows / lengths * old_rows.double().norm(dim=1).median()
    return torch.cat([old_rows, new_rows.float()])


def _means(old_rows: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    mean_of_all = old_rows.mean(dim=0, dtype=torch.float64)
    rows = [old_rows[list(ids)].mean(dim=0, dtype=torch.float64) if ids else mean_of_all for ids in pieces]
    return torch.stack(rows)


def _draws(old_rows: Tensor, number: int, seed: int) -> Tensor:
    rows = old_rows.double()
    mean = rows.mean(dim=0)
    centred = rows - mean
    covariance = centred.mT @ centred / len(rows)  # [D, D]
    # With fewer rows than entries, or a constant entry, there is no factor; a millionth more makes one.
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean() + 1e-30)
    factor = torch.linalg.cholesky(covariance)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(number, rows.shape[1], generator=generator, dtype=torch.float64)
    return mean + SPREAD**0.5 * (normal @ factor.mT)
