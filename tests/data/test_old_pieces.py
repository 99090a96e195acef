"""What new tokens were spelled with before, whoever extended the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken

from cpt.config import Fault
from cpt.data.prepare.extend_tokenizer import extend_tokenizer
from cpt.data.prepare.old_pieces import old_pieces
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.prepare.train_tokenizer import train_tokenizer

TEXT = "The old man went down to the sea again, and the sea was calm.\n"
NEW_TEXT = "吾輩は猫である。名前はまだ無い。 " * 2 + "the seaman is a gentleman again "


def write_text(path: Path, text: str) -> Path:
    path.write_text("".join(json.dumps({"text": f"{text}{number}"}) + "\n" for number in range(20)))
    return path


def trained(folder: Path, kind: str) -> Path:
    train_tokenizer([write_text(folder / "old.jsonl", TEXT)], folder / "base", 300, kind)
    return folder / "base"


def extended(folder: Path, kind: str) -> tuple[Tokenizer, Tokenizer]:
    base = trained(folder, kind)
    extend_tokenizer(base, [write_text(folder / "new.jsonl", NEW_TEXT)], folder / "t", 330)
    return Tokenizer.open(base), Tokenizer.open(folder / "t")


@pytest.mark.parametrize("kind", ["byte-bpe", "sentencepiece"])
def test_every_new_token_is_spelled_with_old_ones(kind, tmp_path):
    old, new = extended(tmp_path, kind)
    pieces = old_pieces(old, new)
    assert len(pieces) == 30
    for number, ids in enumerate(pieces):
        assert ids and max(ids) < 300
        assert old.decode(ids) == new.decode([300 + number])


def test_a_sentencepiece_model_spells_as_sentencepiece_does(tmp_path):
    base = trained(tmp_path, "sentencepiece")
    (base / "tokenizer.json").unlink()
    extend_tokenizer(base, [write_text(tmp_path / "new.jsonl", NEW_TEXT)], tmp_path / "t", 330)
    model = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    new = Tokenizer.open(tmp_path / "t")
    for number, ids in enumerate(old_pieces(Tokenizer.open(base), new)):
        assert ids == model.encode(new.decode([300 + number]))


def test_tokens_that_were_added_by_others_are_spelled_as_their_text_and_gaps_have_no_spelling(tmp_path):
    base = trained(tmp_path, "byte-bpe")
    theirs = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    theirs.add_tokens([AddedToken(" 猫 the", normalized=False), AddedToken("<|x|>", special=True)])
    (tmp_path / "t").mkdir()
    theirs.save(str(tmp_path / "t" / "tokenizer.json"))
    old = Tokenizer.open(base)
    assert old_pieces(old, Tokenizer.open(tmp_path / "t")) == [
        [token.id for token in theirs.model.tokenize("ĠçĮ«Ġthe")],
        old.encode("<|x|>").tolist(),
    ]
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["vocab"]["thethe"] = 302
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    assert old_pieces(old, Tokenizer.open(tmp_path / "t"))[:2] == [[], []]


def test_a_tokenizer_that_extends_nothing_is_refused(tmp_path):
    old, new = extended(tmp_path, "byte-bpe")
    with pytest.raises(Fault, match=r"has the 300 entries of .* and none more"):
        old_pieces(old, old)
    train_tokenizer([write_text(tmp_path / "other.jsonl", NEW_TEXT)], tmp_path / "other", 310, "byte-bpe")
    told = r"does not extend .*: id \d+ is '.+' in one and '.+' in the other; cpt data tokenizer --extend makes one"
    with pytest.raises(Fault, match=told):
        old_pieces(old, Tokenizer.open(tmp_path / "other"))
    with pytest.raises(Fault, match="id 300 is .* in one and None in the other"):
        old_pieces(new, old)
