"""`cpt bench data` measures our readers beside whatever peers are there, and says which are not."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from cpt_harness.numbered import numbered_corpus

from cpt import cli
from cpt.benchmarks import data as bench
from cpt.benchmarks import machine, ours
from cpt.benchmarks.data import Settings, compare
from cpt.benchmarks.material import make_material
from cpt.benchmarks.measure import Reader, Spread, microseconds_a_sample
from cpt.benchmarks.peers import megatron_core
from cpt.config import Fault
from cpt.data.shards import Shard

SMALL = ["--tokens", "20K", "--sequence-length", "16", "--batch", "2,8", "--repetitions", "2", "--order-tokens", "1M"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("cpt.benchmarks.measure._SECONDS_A_REPETITION", 0.001)


@pytest.fixture
def no_peers(monkeypatch):
    """As if none of them were installed."""

    def version(package: str) -> str:
        if package in ("numpy", "torch"):
            return "1"
        raise PackageNotFoundError(package)

    monkeypatch.setattr(machine, "version", version)


def test_the_tables_tell_of_our_readers_and_of_absent_peers(no_peers, tmp_path, capsys):
    assert cli.main(["bench", "data", *SMALL, "--folder", str(tmp_path), "--json", str(tmp_path / "x.json")]) == 0
    printed = capsys.readouterr().out
    assert "samples of 16 + 1 tokens out of 20,000" in printed
    for package in ("megatron-core", "litdata", "mosaicml-streaming", "datasets"):
        assert f"not installed (pip install {package})" in printed
    result = json.loads((tmp_path / "x.json").read_text())
    assert {(rate["name"], rate["batch"]) for rate in result["read_rates"]} >= {
        ("ours, 1 source", 2),
        ("ours, 2 sources, document starts", 8),
        ("loop of slices of a memory map", 8),
    }
    for rate in result["read_rates"]:
        spread = rate["microseconds"]
        assert 0 < spread["smallest"] <= spread["median"] <= spread["largest"]
        assert rate["speedup"] is None
    assert [start["name"] for start in result["start_ups"]] == ["ours"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_peer_that_fails_is_told_and_the_others_are_measured(no_peers, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(machine, "version", lambda package: "1")

    def fails(*_):
        raise RuntimeError("no such operator\nand more")

    names = ["megatron_core"]
    monkeypatch.setattr(bench, "names_of_choices", lambda folder: names)
    monkeypatch.setattr(megatron_core, "readers", fails)
    result = compare(Settings(16, (2,), 20_000, 100_000, 1, folder=tmp_path))
    assert result.missing == {"megatron-core": "failed: RuntimeError: no such operator"}
    assert len(result.read_rates) == 6
    assert "megatron-core cannot take part" in caplog.messages


def test_ratios_are_taken_turn_by_turn():
    readers = [Reader("ours", int, 4), Reader(bench.YARDSTICK, int)]
    ours_rate, yardstick = bench._rates(readers, [[1.0, 2.0, 4.0], [20.0, 60.0, 40.0]])
    assert ours_rate.speedup == Spread(20.0, 10.0, 30.0)
    assert ours_rate.microseconds == Spread(2.0, 1.0, 4.0)
    assert yardstick.speedup == Spread(1.0, 1.0, 1.0)


def test_repetitions_take_turns():
    turns = []
    readers = [Reader(name, lambda number, name=name: turns.append(name) or number) for name in "ab"]
    taken = microseconds_a_sample(readers, 3)
    assert turns[-6:] == ["a", "b"] * 3
    assert [len(values) for values in taken] == [3, 3]


def test_random_text_has_documents_of_about_a_thousand_tokens_that_end_in_0(tmp_path):
    material = make_material(None, tmp_path, 300_000, 16)
    shard = Shard(material.whole)
    assert shard.num_tokens == 300_000
    assert 700 < shard.num_tokens / shard.num_documents < 1500
    assert all(shard.document(index)[-1] == 0 for index in range(shard.num_documents - 1))
    halves = [Shard(half).tokens for half in material.halves]
    assert np.array_equal(np.concatenate(halves), shard.tokens)


def test_the_text_of_a_corpus_is_taken_from_its_beginning(tmp_path):
    corpus = numbered_corpus(tmp_path / "c", 3000, num_shards=7)
    material = make_material(corpus, tmp_path, 2000, 16)
    assert np.array_equal(material.tokens, np.arange(2000))
    assert material.samples.shape == (117, 17)


def test_our_readers_read_whole_batches(tmp_path):
    material = make_material(None, tmp_path, 20_000, 16)
    for reader in [*ours.readers(material, 8), ours.slice_loop(material, 8)]:
        assert reader.read(1) == 8
        assert reader.read(17) == 24


def test_a_text_too_short_to_compare_is_told(tmp_path):
    with pytest.raises(Fault, match=r"the text gives 100 tokens, too few to compare at sequence length 16; raise"):
        make_material(None, tmp_path, 100, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "batch = 0: at least 1 each, such as 64,256"),
        (["--sequence-length", "1"], "sequence_length = 1: at least 2"),
        (["--repetitions", "0"], "repetitions = 0: at least 1"),
        (["--tokens", "0"], "tokens = 0: at least 1"),
        (["--order-tokens", "5"], "order_tokens = 5: at least 1000 sequences"),
        (["nowhere"], "there is no corpus at nowhere"),
    ],
)
def test_what_cannot_be_measured_is_told(words, message, capsys):
    assert cli.main(["bench", "data", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["megatron_core", "lit_data", "mosaicml_streaming", "hugging_face"])
def test_a_peer_reads_whole_samples_of_the_text(package, tmp_path):
    import importlib

    peer = importlib.import_module(f"cpt.benchmarks.peers.{package}")
    if not machine.versions(peer.PACKAGE):
        pytest.skip(f"{peer.PACKAGE} is not installed")
    readers = peer.readers(make_material(None, tmp_path, 40_000, 16), tmp_path, 4)
    assert all(reader.read(5) >= 5 for reader in readers)
