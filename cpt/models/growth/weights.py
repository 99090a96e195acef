"""The weights of a model with a larger vocabulary, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from cpt.config import Fault
from cpt.models.growth.rows import Init, grown_rows
from cpt.parallel.seeds import derive_seed

EMBEDDING, HEAD = "embedding.weight", "head.weight"


class GrownWeights(Mapping[str, Tensor]):
    """Weights by our names: those of `weights`, with rows for new tokens in the embedding and in the head.

    pieces: the old ids that spelled each new token, in the order of the new ids, which begin at `num_old`, the size of
    the old tokenizer. Rows of the old matrices from there on are padding, and are left out.
    Input and output each have new rows of their own; a tied matrix, which is both, has plain means, as a head must.

    Raises Fault, at once, if an old matrix has fewer rows than `num_old`: the tokenizer is of another model.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        init: Init,
        pieces: Sequence[Sequence[int]],
        num_old: int,
        seed: int,
        *,
        num_rows: int,
    ) -> None:
        if num_rows < num_old:
            raise Fault(
                f"the weights have rows for {num_rows:,} tokens, their tokenizer has {num_old:,} entries: "
                "it is of another model"
            )
        self._weights, self._init, self._pieces, self._num_old, self._seed = weights, init, pieces, num_old, seed
        self._is_tied = HEAD not in weights

    @property
    def vocabulary(self) -> int:
        """Rows of the grown matrices."""
        return self._num_old + len(self._pieces)

    def is_grown(self, name: str) -> bool:
        """Whether the weight `name` has new rows; every other is read from the old weights as it is."""
        return name in (EMBEDDING, HEAD)

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        if not self.is_grown(name):
            return weight
        seed = derive_seed(self._seed, "growth", name)
        is_input_only = name == EMBEDDING and not self._is_tied
        return grown_rows(weight[: self._num_old], self._pieces, self._init, seed, rescaled=is_input_only)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
