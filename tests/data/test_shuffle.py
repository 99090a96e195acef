"""A shuffle puts every document once into an order that its seed alone decides, uniformly, each corpus on its own."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.prepare import build as building
from cpt.data.prepare import corpora, shuffle
from cpt.data.prepare.build import build_corpus
from cpt.data.prepare.corpora import folder_of_domain
from cpt.data.prepare.shuffle import Buckets
from cpt.data.prepare.verify import verify_corpus

TOKEN_TYPE = np.dtype("<u2")


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["</s>"])
    (tmp_path / "t").mkdir()
    made.save(str(tmp_path / "t" / "tokenizer.json"))
    return tmp_path / "t"


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def documents_in(folder: Path) -> list[bytes]:
    corpus = Corpus.open(folder)
    shards = [corpus.shard(index) for index in range(corpus.num_shards)]
    return [shard.document(number).tobytes() for shard in shards for number in range(shard.num_documents)]


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def order_of(folder: Path, count: int, seed: int) -> list[int]:
    buckets = Buckets(folder, seed, TOKEN_TYPE)
    for number in range(count):
        buckets.add_document(number, 0, np.array([number]), 1)
    return [int(tokens[0]) for bucket in range(len(buckets)) for _, tokens, _ in buckets.documents(bucket)]


def test_the_order_is_a_permutation_that_the_seed_decides_and_the_number_of_buckets_does_not(tmp_path, monkeypatch):
    orders = []
    for number, (seed, num_buckets) in enumerate([(0, 7), (0, 1), (1, 7)]):
        monkeypatch.setattr(shuffle, "NUM_BUCKETS", num_buckets)
        orders.append(order_of(tmp_path / str(number), 500, seed))
    assert sorted(orders[0]) == list(range(500))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_a_document_goes_anywhere_whatever_its_place(tmp_path):
    order = order_of(tmp_path / "b", 4000, 3)
    # Spearman's correlation of places before and after; five standard deviations of 1 / sqrt(n).
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 5 / 4000**0.5
    # The first documents of the new order come from all quarters of the old one.
    quarters = np.bincount(np.array(order[:400]) // 1000, minlength=4)
    assert quarters.min() > 100 - 5 * (400 * 3 / 16) ** 0.5


def test_a_shuffled_corpus_holds_the_same_documents_in_another_order(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 100)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {number}"} for number in range(200)])
    build_corpus([path], tokenizer, tmp_path / "ordered")
    options = {"shuffle_seed": 2**64 - 1, "shard_tokens": 300}
    report = build_corpus([path], tokenizer, tmp_path / "one", **options)
    build_corpus([path], tokenizer, tmp_path / "three", workers=3, **options)
    assert report.num_documents == 200 and report.num_shards > 3
    assert files_under(tmp_path / "one") == files_under(tmp_path / "three")
    ordered, shuffled = documents_in(tmp_path / "ordered"), documents_in(tmp_path / "one")
    assert shuffled != ordered and sorted(shuffled) == sorted(ordered)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(tmp_path, tokenizer, seed):
    with pytest.raises(Fault, match=rf"shuffle_documents = {seed} is no seed; use a whole number from 0 to before"):
        build_corpus([], tokenizer, tmp_path / "c", shuffle_seed=seed)


def test_each_domain_is_a_corpus_with_a_held_out_part(tmp_path, tokenizer, caplog):
    records = [{"text": f"text {number}", "kind": ["a b/c", 7][number % 2]} for number in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", [*records, {"text": "only", "kind": "rare"}])
    report = build_corpus([path], tokenizer, tmp_path / "c", domain_key="kind", holdout=0.3)
    assert sorted(folder.name for folder in (tmp_path / "c").iterdir()) == ["7", "a-b-c", "rare"]
    assert sorted(folder.name for folder in (tmp_path / "c-held-out").iterdir()) == ["7", "a-b-c"]
    for folder in [*(tmp_path / "c").iterdir(), *(tmp_path / "c-held-out").iterdir()]:
        assert verify_corpus(folder).damage == ()
    assert [part.path.name for part in report.domains] == ["7", "a-b-c", "rare"]
    assert sum(part.num_documents for part in (*report.domains, *report.held_out.domains)) == 101
    assert report.num_tokens == sum(Corpus.open(part.path).num_tokens for part in report.domains)
    both = documents_in(tmp_path / "c" / "7") + documents_in(tmp_path / "c-held-out" / "7")
    build_corpus([write_jsonl(tmp_path / "b.jsonl", records[1::2])], tokenizer, tmp_path / "seven")
    assert sorted(both) == sorted(documents_in(tmp_path / "seven"))
    assert "no document is held out of: rare" in caplog.messages


@pytest.mark.parametrize(
    ("domain", "folder"),
    [("Wikipedia (en)", "Wikipedia-en"), ("c++", "c++"), ("../up", "up"), ("漢字", "漢字"), ("x" * 300, "x" * 100)],
)
def test_a_domain_gives_a_safe_name(domain, folder):
    assert folder_of_domain(domain) == folder


@pytest.mark.parametrize("domain", ["..", "/", "-"])
def test_a_domain_that_gives_no_name_is_told(domain):
    with pytest.raises(Fault, match=r"gives no name for a folder; give it one with letters or digits"):
        folder_of_domain(domain)


def test_domains_that_would_share_a_folder_are_told(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "kind": "a/b"}, {"text": "y", "kind": "A b"}])
    with pytest.raises(Fault, match="the domains 'a/b' and 'A b' would both go to the folder A-b; rename one in the"):
        build_corpus([path], tokenizer, tmp_path / "c", domain_key="kind")


def test_a_key_with_a_value_a_document_is_told(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "MOST_DOMAINS", 5)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "kind": number} for number in range(9)])
    with pytest.raises(Fault, match="more than 5 domains, '5' the last; --domain-key is for a key with few values"):
        build_corpus([path], tokenizer, tmp_path / "c", domain_key="kind")


def test_documents_leave_memory_before_the_next_checkpoint(tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 10)
    monkeypatch.setattr(building, "LARGEST_BUFFER", 200)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "text"} for _ in range(100)])
    waiting = []
    after_writing = building._Build._after_writing

    def watch(build):
        after_writing(build)
        spools = [*build._buckets._spools, *(corpus.writer._spool for corpus in build._corpora._corpora)]
        waiting.append(sum(tokens.nbytes for spool in spools for tokens in spool._tokens))

    monkeypatch.setattr(building._Build, "_after_writing", watch)
    with caplog.at_level(logging.INFO):
        build_corpus([path], tokenizer, tmp_path / "c", shuffle_seed=0)
    assert len(waiting) > 30 and max(waiting) < 300
    assert "writing 100 documents in a new order" in caplog.messages
