"""Llama: rotary positions, grouped-query attention, RMSNorm before each layer, SwiGLU, no biases.

    tokens -> embedding -> [+ attention(norm) -> + feed-forward(norm)] x layers -> norm -> head -> losses or logits

B sequences, S positions, D width, K head width, V vocabulary.
Source: Touvron et al. 2023, arXiv:2302.13971; grouped queries: arXiv:2307.09288.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cpt.models.layers.attention import Attention
from cpt.models.layers.feed_forward import FeedForward
from cpt.models.layers.head import Head
from cpt.models.layers.norm import RMSNorm
from cpt_kernels import Kernels, rotary


@dataclass(frozen=True)
class Settings:
    """The shape of a Llama. `None` means: derived, as the property of the longer name says."""

    vocabulary: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    head_width: int | None = None
    mlp_width: int | None = None
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5
    tied: bool = False
    initial_std: float = 0.02
    longest_sequence: int = 2048

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads: as many as query heads unless told."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def width_of_head(self) -> int:
        """Width of one head: the model's width shared out among the heads unless told."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def width_of_mlp(self) -> int:
        """Width of the feed-forward layer: 8/3 of the model's, rounded up to a multiple of 64, unless told."""
        return -(-8 * self.width // (3 * 64)) * 64 if self.mlp_width is None else self.mlp_width

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the model by name, with its shape, in the model's order; a tied one once."""
        queries, keys = self.heads * self.width_of_head, self.num_kv_heads * self.width_of_head
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocabulary, self.width)}
        for block in (f"blocks.{index}" for index in range(self.layers)):
            shapes[f"{block}.attention_norm.weight"] = (self.width,)
            shapes[f"{block}.attention.query.weight"] = (queries, self.width)
            shapes[f"{block}.attention.key.weight"] = (keys, self.width)
            shapes[f"{block}.attention.value.weight"] = (keys, self.width)
            shapes[f"{block}.attention.output.weight"] = (self.width, queries)
            shapes[f"{block}.mlp_norm.weight"] = (self.width,)
            shapes[f"{block}.mlp.gate.weight"] = (self.width_of_mlp, self.width)
            shapes[f"{block}.mlp.up.weight"] = (self.width_of_mlp, self.width)
            shapes[f"{block}.mlp.down.weight"] = (self.width, self.width_of_mlp)
        shapes["norm.weight"] = (self.width,)
        if not self.tied:
            shapes["head.weight"] = (self.vocabulary, self.width)
        return shapes

    @property
    def num_parameters(self) -> int:
        """All weights; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that each token is multiplied with: all matrices, with the head and without the input embedding."""
        matrices = sum(math.prod(shape) for shape in self.shapes.values() if len(shape) == 2)
        return matrices if self.tied else matrices - self.vocabulary * self.width

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of forward and backward for one token: 6 a weight, and causal attention.

        Causal: a position meets half of all positions on average, so attention costs 6 x layers x heads x K x S, half
        of what is often quoted.
        """
        attention_width = self.heads * self.width_of_head
        return 6.0 * self.num_matmul_parameters + 6.0 * self.layers * attention_width * sequence_length

    def faults(self) -> list[str]:
        """One line for each contradiction; the names in them are fields of these settings."""
        counts = ("vocabulary", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "longest_sequence")
        numbers = ("rope_base", "norm_epsilon", "initial_std")
        lines = [
            f"{name} = {value}: must be more than 0"
            for name in counts + numbers
            if (value := getattr(self, name)) is not None and value <= 0
        ]
        if lines:
            return lines
        if self.head_width is None and self.width % self.heads:
            lines.append(
                f"width = {self.width}: {self.heads} heads cannot share it evenly; change it or set head_width"
            )
        elif self.width_of_head % 2:
            name = "width / heads" if self.head_width is None else "head_width"
            lines.append(f"{name} = {self.width_of_head}: rotary positions turn pairs of entries; make it even")
        if self.heads % self.num_kv_heads:
            divisors = [str(n) for n in range(1, self.heads + 1) if self.heads % n == 0]
            lines.append(
                f"kv_heads = {self.kv_heads}: {self.heads} heads cannot share them evenly; use {', '.join(divisors)}"
            )
        return lines


class Model(nn.Module):
    """A Llama for one device. Its weights are not set until `initialise`, or until they are loaded."""

    def __init__(self, settings: Settings, kernels: Kernels) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings.vocabulary, settings.width)
        self.blocks = nn.ModuleList(Block(settings, kernels) for _ in range(settings.layers))
        self.norm = RMSNorm(settings.width, settings.norm_epsilon, kernels)
        tied_to = self.embedding.weight if settings.tied else None
        self.head = Head(settings.vocabulary, settings.width, kernels, tied_to)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Losses [B, S] in fp32, each that of predicting `targets[b, s]` from tokens up to s; without targets, logits.

        tokens and targets [B, S] int64 -> losses [B, S], or logits [B, S, V] in the type of the weights.
        Raises ValueError for sequences longer than the settings allow.
        """
        num_positions = tokens.shape[1]
        if num_positions > self.settings.longest_sequence:
            raise ValueError(
                f"a sequence of {num_positions} tokens is longer than"
                f" model.longest_sequence = {self.settings.longest_sequence}"
            )
        angles = rotary.table(num_positions, self.settings.width_of_head, self.settings.rope_base, tokens.device)
        hidden = self.embedding(tokens)  # [B, S, D]
        for block in self.blocks:
            hidden = block(hidden, angles)
        return self.head(self.norm(hidden), targets)

    def initialise(self, seed: int) -> None:
        """Set every weight to its initial value; see `initial_value`."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(self.initial_value(name, seed))

    def initial_value(self, name: str, seed: int) -> Tensor:
        """The weight `name` before training, fp32 on the CPU: the same on every rank, device and number of ranks.

        Norms are 1. Matrices are normal with `initial_std`; those that add to the residual stream are smaller by
        sqrt(2 x layers), so that the stream's variance does not grow with depth (as in GPT-2).
        """
        shape = self.settings.shapes[name]  # not the parameter's own: ZeRO-3 leaves it empty
        if not decays(name):
            return torch.ones(shape)
        std = self.settings.initial_std
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            std /= (2 * self.settings.layers) ** 0.5
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward, causal; see `Settings.flops_per_token`."""
        return self.settings.flops_per_token(sequence_length)

    def num_parameters(self) -> int:
        """All weights, however they are sharded; a tied embedding counts once."""
        return self.settings.num_parameters

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to the parameter `name`."""
        return decays(name)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to what it was given."""

    def __init__(self, settings: Settings, kernels: Kernels) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(settings.width, settings.norm_epsilon, kernels)
        self.attention = Attention(
            settings.width, settings.heads, settings.num_kv_heads, settings.width_of_head, kernels
        )
        self.mlp_norm = RMSNorm(settings.width, settings.norm_epsilon, kernels)
        self.mlp = FeedForward(settings.width, settings.width_of_mlp, kernels)

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        """hidden [B, S, D], angles [2, S, K/2] -> [B, S, D]."""
        hidden = hidden + self.attention(self.attention_norm(hidden), angles)
        return hidden + self.mlp(self.mlp_norm(hidden))


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter: to matrices, embeddings among them, and not to norms."""
    return not name.endswith("norm.weight")
