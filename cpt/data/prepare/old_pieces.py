"""What the new tokens of an extended tokenizer were before: the old tokens that spelled them."""

from __future__ import annotations

from cpt.config import Fault
from cpt.data.prepare.pieces import Vocabulary
from cpt.data.prepare.tokenizers import Tokenizer


def old_pieces(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """For every id from `old.vocabulary_size` on: the ids that `old` cuts the new token's text into.

    Empty for an id that no token has. Raises Fault if an old id means something else in `new`, if `new` has no more
    entries, or if either is no BPE that we know.
    """
    before, after = Vocabulary.of(old), Vocabulary.of(new)
    difference = after.difference_from(before)
    if difference:
        raise Fault(
            f"{new.deciding_file} does not extend {old.deciding_file}: {difference}; "
            "cpt data tokenizer --extend makes one that does"
        )
    if after.size == before.size:
        raise Fault(f"{new.deciding_file} has the {before.size:,} entries of {old.deciding_file} and none more")
    return [after.cut(token_id, before) for token_id in range(before.size, after.size)]
