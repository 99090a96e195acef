"""Pythia, and every GPT-NeoX: rotary positions on a part of each head, attention and feed-forward side by side.

    parallel:    x + attention(norm(x)) + mlp(other_norm(x))
    sequential:  y = x + attention(norm(x));  y + mlp(other_norm(y))

Query, key and value are three matrices here and one, head by head, in Hugging Face's files. Three, because the
attention layer is then the one that Llama has, a cut for tensor parts takes neighbouring rows of each, and whoever asks
for a parameter by name can tell them apart. The price is three products in place of one. Conversion moves rows.

B sequences, S positions, D width, K head width.
Source: Biderman et al. 2023, arXiv:2304.01373; GPT-NeoX-20B: Black et al. 2022, arXiv:2204.06745.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from cpt.config import chosen_from
from cpt.models.layers.attention import Attention
from cpt.models.layers.cuts import Cut
from cpt.models.layers.decoder import Decoder
from cpt.models.layers.feed_forward import Activation, UngatedFeedForward
from cpt.models.layers.norm import LayerNorm, RMSNorm
from cpt.models.layers.shape import Shape, not_positive, with_biases
from cpt_kernels import Documents, Kernels

CUTS: dict[str, Cut] = {
    "embedding.weight": "vocabulary",
    "blocks.*.attention_norm.weight": "whole",
    "blocks.*.attention_norm.bias": "whole",
    "blocks.*.attention.query.weight": "column",
    "blocks.*.attention.query.bias": "column",
    "blocks.*.attention.key.weight": "column",
    "blocks.*.attention.key.bias": "column",
    "blocks.*.attention.value.weight": "column",
    "blocks.*.attention.value.bias": "column",
    "blocks.*.attention.output.weight": "row",
    "blocks.*.attention.output.bias": "whole",
    "blocks.*.mlp_norm.weight": "whole",
    "blocks.*.mlp_norm.bias": "whole",
    "blocks.*.mlp.up.weight": "column",
    "blocks.*.mlp.up.bias": "column",
    "blocks.*.mlp.down.weight": "row",
    "blocks.*.mlp.down.bias": "whole",
    "norm.weight": "whole",
    "norm.bias": "whole",
    "head.weight": "vocabulary",
}
_COUNTS = ("vocabulary", "width", "layers", "heads", "mlp_width", "longest_sequence")
_NUMBERS = ("rope_base", "norm_epsilon", "initial_std")
_NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


@dataclass(frozen=True)
class Settings(Shape):
    """The shape of a GPT-NeoX; the defaults are those of all Pythias. `None` means: derived, as the property says.

    `rotary_share`: part of each head that is turned by its position. `attention_bias` and `mlp_bias` are of all four
    and of both projections. `initial_std`: left out, GPT-NeoX's own custom, see `std_of`.
    `rope_scaling`: one of cpt/models/rope_scaling. Hugging Face has a form for `norm: layer_norm` with `mlp_bias` only.
    """

    vocabulary: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    mlp_width: int | None = None
    has_parallel_residual: bool = True
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    activation: Activation = "gelu"
    attention_bias: bool = True
    mlp_bias: bool = True
    rotary_share: float = 0.25
    rope_base: float = 10000.0
    rope_scaling: Any | None = field(default=None, metadata=chosen_from("cpt.models.rope_scaling"))
    norm_epsilon: float = 1e-5
    tied: bool = False
    initial_std: float | None = None
    longest_sequence: int = 2048

    # How the family was trained: GPT-NeoX has neither a mask nor positions for the documents of a window.
    attends_across_documents: ClassVar[bool] = True

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads: as many as query heads."""
        return self.heads

    @property
    def width_of_head(self) -> int:
        """Width of one head: the model's width shared out among the heads."""
        return self.width // self.heads

    @property
    def rotary_width(self) -> int:
        """Entries of each head, the first ones, that are turned by its position."""
        return int(self.width_of_head * self.rotary_share)

    @property
    def width_of_mlp(self) -> int:
        """Width of the feed-forward layer: four times the model's unless told."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the model by name, with its shape, in the model's order; a tied one once."""
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocabulary, self.width)}
        for block in (f"blocks.{index}" for index in range(self.layers)):
            shapes |= self._shapes_of_norm(f"{block}.attention_norm")
            for projection in ("query", "key", "value", "output"):
                square = (self.width, self.width)
                shapes |= with_biases(f"{block}.attention.{projection}", square, self.attention_bias)
            shapes |= self._shapes_of_norm(f"{block}.mlp_norm")
            shapes |= with_biases(f"{block}.mlp.up", (self.width_of_mlp, self.width), self.mlp_bias)
            shapes |= with_biases(f"{block}.mlp.down", (self.width, self.width_of_mlp), self.mlp_bias)
        shapes |= self._shapes_of_norm("norm")
        if not self.tied:
            shapes["head.weight"] = (self.vocabulary, self.width)
        return shapes

    def _shapes_of_norm(self, name: str) -> dict[str, tuple[int, ...]]:
        return with_biases(name, (self.width,), self.norm == "layer_norm")

    def std_of(self, name: str) -> float:
        """Deviation of the matrix `name` before training, less for what adds to the residual stream.

        GPT-NeoX's custom, with which Pythia began: sqrt(2 / 5D) ("small init", Nguyen and Salazar 2019,
        arXiv:1910.05895), and 2 / (layers x sqrt(D)) for what adds to the stream ("wang init"). With an `initial_std`:
        that, and less by sqrt(2 x layers).
        """
        adds = name.endswith(("attention.output.weight", "mlp.down.weight"))
        if self.initial_std is not None:
            return self.initial_std / (2 * self.layers) ** 0.5 if adds else self.initial_std
        return 2 / (self.layers * math.sqrt(self.width)) if adds else math.sqrt(2 / (5 * self.width))

    def faults(self) -> list[str]:
        """One line for each contradiction; the names in them are fields of these settings."""
        lines = not_positive(self, _COUNTS + _NUMBERS)
        if lines:
            return lines
        if self.width % self.heads:
            return [f"width = {self.width}: {self.heads} heads cannot share it evenly; change one of them"]
        if not 0 < self.rotary_share <= 1:
            return [f"rotary_share = {self.rotary_share}: a part of each head, above 0 and up to 1"]
        if self.rotary_width < 2 or self.rotary_width % 2:
            lines.append(
                f"rotary_share = {self.rotary_share}: turns {self.rotary_width} of {self.width_of_head} entries of a"
                " head; rotary positions turn pairs, make it an even number"
            )
        return lines


class Model(Decoder):
    """A GPT-NeoX for one device. Its weights are not set until `initialise`, or until they are loaded."""

    def __init__(self, settings: Settings, kernels: Kernels) -> None:
        norm = _NORMS[settings.norm](settings.width, settings.norm_epsilon, kernels)
        super().__init__(settings, kernels, lambda: Block(settings, kernels), norm)


class Block(nn.Module):
    """One layer: attention and feed-forward, side by side or one after the other, added to what it was given."""

    def __init__(self, settings: Settings, kernels: Kernels) -> None:
        super().__init__()
        self.is_parallel = settings.has_parallel_residual
        self.attention_norm = _NORMS[settings.norm](settings.width, settings.norm_epsilon, kernels)
        self.attention = Attention(
            settings.width,
            settings.heads,
            settings.heads,
            settings.width_of_head,
            kernels,
            "all" if settings.attention_bias else "none",
        )
        self.mlp_norm = _NORMS[settings.norm](settings.width, settings.norm_epsilon, kernels)
        self.mlp = UngatedFeedForward(
            settings.width, settings.width_of_mlp, settings.activation, kernels, settings.mlp_bias
        )

    def forward(self, hidden: Tensor, angles: Tensor, documents: Documents | None = None) -> Tensor:
        """hidden [B, S, D], angles [2, S, R/2] or [2, B, S, R/2] of the R turned entries -> [B, S, D]."""
        mixed = self.attention(self.attention_norm(hidden), angles, documents)
        if self.is_parallel:
            return self.mlp(self.mlp_norm(hidden)) + mixed + hidden
        normal, hidden = self.mlp_norm(mixed, hidden)
        return hidden + self.mlp(normal)
