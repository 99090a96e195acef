"""Corpora of real text in seven domains have as many bytes a token as their makers counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cpt.data.corpus import Corpus
from cpt.data.prepare.build import build_corpus
from cpt.data.prepare.verify import verify_corpus

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
DOMAINS = ("en", "en2", "fr", "de", "ar", "ja", "code")

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared corpus is not here")


def table() -> dict[tuple[str, str], float]:
    """Bytes a token by tokenizer and domain, out of the README beside the corpus."""
    rows = [line.strip("|").split("|") for line in (SHARED / "README.md").read_text().splitlines() if "|" in line]
    rows = [[cell.strip() for cell in row] for row in rows]
    first = next(number for number, row in enumerate(rows) if "pythia-20b" in row)
    names = rows[first][1:]
    found = {}
    for row in rows[first + 1 :]:
        if row[0] in DOMAINS and all(re.fullmatch(r"\d\.\d\d", cell) for cell in row[1:]):
            found |= {(name, row[0]): float(cell) for name, cell in zip(names, row[1:], strict=True)}
    return found


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("tokenizer", ["mistral-v1-32k", "multi-sp-8k"])
def test_bytes_a_token_are_those_of_the_table(tmp_path, tokenizer, domain):
    text = SHARED / "corpus" / domain / "valid.jsonl.gz"
    # The table counts the tokens of the text, without ends of documents.
    build_corpus([text], SHARED / "tokenizers" / tokenizer, tmp_path / "c", append_eos=False)
    corpus = Corpus.open(tmp_path / "c")
    assert round(corpus.num_bytes / corpus.num_tokens, 2) == table()[tokenizer, domain]
    assert verify_corpus(tmp_path / "c").damage == ()
