"""What all decoders do alike: tokens through blocks to losses, and weights that are set by name.

B sequences, S positions, D width, K head width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cpt.models import rope_scaling
from cpt.models.layers.head import Head
from cpt_kernels import Documents, Kernels


class Decoder(nn.Module):
    """Embedding, blocks, a last norm and a head. Weights are not set until `initialise`, or until they are loaded.

    `settings` have the model's `shapes`, `rotary_width`, `std_of(name)` and what `Shape` derives from them.
    """

    def __init__(self, settings: Any, kernels: Kernels, make_block: Callable[[], nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        # Of the window's positions those that are computed here: all, until `sharing` exchanges it.
        self.positions_here = nn.Identity()
        self.embedding = nn.Embedding(settings.vocabulary, settings.width)
        # By number and not a list: a part of the model has some of them only, under their own numbers.
        self.blocks = nn.ModuleDict({str(index): make_block() for index in range(settings.layers)})
        self.norm = norm
        tied_to = self.embedding.weight if settings.tied else None
        self.head = Head(settings.vocabulary, settings.width, kernels, tied_to)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Documents | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Losses [B, S] in fp32, each that of predicting `targets[b, s]` from tokens up to s; without targets, logits.

        tokens and targets [B, S] int64 -> losses [B, S], or logits [B, S, V] in the type of the weights. A target that
        is IGNORED (see cpt_kernels.cross_entropy) has loss 0. With `documents` of the same tokens each document is
        treated as if it stood alone: attention does not leave it, and its first position is 0.
        A model that was cut between its layers (see `parting`) begins at `hidden` [B, S, D], which the part before has
        made of the same tokens, and ends with hidden states too unless it is the last part. One whose ranks share the
        positions of a window (see `sharing`) is given all of tokens, targets and documents, and returns what is of its
        own positions.
        Raises ValueError for sequences longer than the settings allow.
        """
        settings, num_positions = self.settings, tokens.shape[1]
        if num_positions > settings.longest_sequence:
            raise ValueError(
                f"a sequence of {num_positions} tokens is longer than"
                f" model.longest_sequence = {settings.longest_sequence}"
            )
        angles = rope_scaling.angles(
            settings.rope_scaling, settings.rotary_width, settings.rope_base, num_positions, tokens.device
        )
        if documents is not None:
            angles = angles[:, documents.positions]  # [2, B, S, K/2]
        if hidden is None:
            hidden = self.embedding(self.positions_here(tokens))  # [B, S, D]
        for block in self.blocks.values():
            hidden = block(hidden, angles, documents)
        if self.head is None:
            return hidden
        return self.head(self.norm(hidden), None if targets is None else self.positions_here(targets))

    def materialise(self, device: torch.device) -> None:
        """Memory on `device` for a model that was built under `torch.device("meta")`, with values that mean nothing."""
        self.to_empty(device=device)
        if self.settings.tied and self.head is not None:  # to_empty gives each of the two owners memory of its own
            self.head.weight = self.embedding.weight

    def initialise(self, seed: int) -> None:
        """Set every weight to its initial value; see `initial_value`."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(self.initial_value(name, seed))

    def initial_value(self, name: str, seed: int) -> Tensor:
        """The weight `name` before training, fp32 on the CPU: the same on every rank, device and number of ranks.

        Norms are 1, biases 0, matrices normal with the deviation that the settings' `std_of(name)` says.
        """
        shape = self.settings.shapes[name]  # not the parameter's own: ZeRO-3 leaves it empty
        if name.endswith(".bias"):
            return torch.zeros(shape, device="cpu")
        if not self.decays(name):
            return torch.ones(shape, device="cpu")
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(shape, device="cpu").normal_(0.0, self.settings.std_of(name), generator=generator)

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward, causal; see `Shape.flops_per_token`."""
        return self.settings.flops_per_token(sequence_length)

    def num_parameters(self) -> int:
        """All weights, however they are sharded; a tied embedding counts once."""
        return self.settings.num_parameters

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to a parameter: to matrices, embeddings among them; no norms, no biases."""
        return not name.endswith(("norm.weight", ".bias"))
