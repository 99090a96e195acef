"""Llama: rotary positions, grouped-query attention, RMSNorm before each layer, SwiGLU.

    tokens -> embedding -> [+ attention(norm) -> + feed-forward(norm)] x layers -> norm -> head -> losses or logits

Mistral (with attention to all positions), Qwen2 (query, key and value have biases), SmolLM and TinyLlama are Llamas.
B sequences, S positions, D width, K head width.
Source: Touvron et al. 2023, arXiv:2302.13971; grouped queries: arXiv:2307.09288.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from cpt.config import chosen_from
from cpt.models.layers.attention import Attention, Biases
from cpt.models.layers.cuts import Cut
from cpt.models.layers.decoder import Decoder
from cpt.models.layers.feed_forward import FeedForward
from cpt.models.layers.norm import RMSNorm
from cpt.models.layers.shape import Shape, not_positive, with_biases
from cpt_kernels import Documents, Kernels

CUTS: dict[str, Cut] = {
    "embedding.weight": "vocabulary",
    "blocks.*.attention_norm.weight": "whole",
    "blocks.*.attention.query.weight": "column",
    "blocks.*.attention.query.bias": "column",
    "blocks.*.attention.key.weight": "column",
    "blocks.*.attention.key.bias": "column",
    "blocks.*.attention.value.weight": "column",
    "blocks.*.attention.value.bias": "column",
    "blocks.*.attention.output.weight": "row",
    "blocks.*.attention.output.bias": "whole",
    "blocks.*.mlp_norm.weight": "whole",
    "blocks.*.mlp.gate.weight": "column",
    "blocks.*.mlp.gate.bias": "column",
    "blocks.*.mlp.up.weight": "column",
    "blocks.*.mlp.up.bias": "column",
    "blocks.*.mlp.down.weight": "row",
    "blocks.*.mlp.down.bias": "whole",
    "norm.weight": "whole",
    "head.weight": "vocabulary",
}
_COUNTS = ("vocabulary", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "longest_sequence")
_NUMBERS = ("rope_base", "norm_epsilon", "initial_std")


@dataclass(frozen=True)
class Settings(Shape):
    """The shape of a Llama. `None` means: derived, as the property of the longer name says.

    `rope_scaling`: one of cpt/models/rope_scaling, such as `{name: llama3, factor: 8, original_length: 8192}`.
    """

    vocabulary: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    head_width: int | None = None
    mlp_width: int | None = None
    attention_bias: Biases = "none"
    mlp_bias: bool = False
    rope_base: float = 10000.0
    rope_scaling: Any | None = field(default=None, metadata=chosen_from("cpt.models.rope_scaling"))
    norm_epsilon: float = 1e-5
    tied: bool = False
    initial_std: float = 0.02
    longest_sequence: int = 2048

    # How the family was trained. Llama 3 says it: within each document (Dubey et al. 2024, arXiv:2407.21783, 3.2).
    attends_across_documents: ClassVar[bool] = False

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
    def rotary_width(self) -> int:
        """Entries of a head that are turned by its position: all."""
        return self.width_of_head

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the model by name, with its shape, in the model's order; a tied one once."""
        queries, keys = self.heads * self.width_of_head, self.num_kv_heads * self.width_of_head
        has_qkv_bias, has_output_bias = self.attention_bias != "none", self.attention_bias == "all"
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocabulary, self.width)}
        for block in (f"blocks.{index}" for index in range(self.layers)):
            shapes[f"{block}.attention_norm.weight"] = (self.width,)
            shapes |= with_biases(f"{block}.attention.query", (queries, self.width), has_qkv_bias)
            shapes |= with_biases(f"{block}.attention.key", (keys, self.width), has_qkv_bias)
            shapes |= with_biases(f"{block}.attention.value", (keys, self.width), has_qkv_bias)
            shapes |= with_biases(f"{block}.attention.output", (self.width, queries), has_output_bias)
            shapes[f"{block}.mlp_norm.weight"] = (self.width,)
            shapes |= with_biases(f"{block}.mlp.gate", (self.width_of_mlp, self.width), self.mlp_bias)
            shapes |= with_biases(f"{block}.mlp.up", (self.width_of_mlp, self.width), self.mlp_bias)
            shapes |= with_biases(f"{block}.mlp.down", (self.width, self.width_of_mlp), self.mlp_bias)
        shapes["norm.weight"] = (self.width,)
        if not self.tied:
            shapes["head.weight"] = (self.vocabulary, self.width)
        return shapes

    def std_of(self, name: str) -> float:
        """Deviation of the matrix `name` before training: `initial_std`, less for what adds to the residual stream.

        Less by sqrt(2 x layers), so that the stream's variance does not grow with depth (as in GPT-2).
        """
        adds = name.endswith(("attention.output.weight", "mlp.down.weight"))
        return self.initial_std / (2 * self.layers) ** 0.5 if adds else self.initial_std

    def faults(self) -> list[str]:
        """One line for each contradiction; the names in them are fields of these settings."""
        lines = not_positive(self, _COUNTS + _NUMBERS)
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


class Model(Decoder):
    """A Llama for one device. Its weights are not set until `initialise`, or until they are loaded."""

    def __init__(self, settings: Settings, kernels: Kernels) -> None:
        norm = RMSNorm(settings.width, settings.norm_epsilon, kernels)
        super().__init__(settings, kernels, lambda: Block(settings, kernels), norm)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to what it was given."""

    def __init__(self, settings: Settings, kernels: Kernels) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(settings.width, settings.norm_epsilon, kernels)
        self.attention = Attention(
            settings.width,
            settings.heads,
            settings.num_kv_heads,
            settings.width_of_head,
            kernels,
            settings.attention_bias,
        )
        self.mlp_norm = RMSNorm(settings.width, settings.norm_epsilon, kernels)
        self.mlp = FeedForward(settings.width, settings.width_of_mlp, kernels, settings.mlp_bias)

    def forward(self, hidden: Tensor, angles: Tensor, documents: Documents | None = None) -> Tensor:
        """hidden [B, S, D], angles [2, S, K/2] or [2, B, S, K/2] -> [B, S, D]."""
        mixed = self.attention(self.attention_norm(hidden), angles, documents)
        normal, hidden = self.mlp_norm(mixed, hidden)
        return hidden + self.mlp(normal)
