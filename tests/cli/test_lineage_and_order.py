"""`cpt lineage` tells what a run descends from; `cpt verify-order` proves that two runs saw the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.cli import main
from cpt.lineage.chain import START, lengthen
from cpt.lineage.ledger import Entry, Ledger
from cpt.lineage.tree import Parent, write_lineage


def make_run(path: Path, parent: Path | None = None) -> Path:
    path.mkdir()
    write_lineage(path, Parent(parent, 244, 999_424, 1e-4) if parent else None)
    entries = [
        Entry("prose", "data/prose", "f", 128, 1, 1000).with_draws(0, 1500),
        Entry("code", "data/code", "g", 128, 1, 4000).with_draws(0, 1000),
    ]
    (path / "ledger.json").write_text(json.dumps(Ledger(tuple(entries)).as_json()))
    return path


def test_the_line_of_ancestors_and_what_was_consumed_are_printed(tmp_path, capsys):
    base = make_run(tmp_path / "base")
    child = make_run(tmp_path / "child", base)
    assert main(["lineage", str(child)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{child}  (began at step 244 of base)"
    assert lines[1] == f"   └─ {base}  (began from nothing)"
    assert [line.split() for line in lines[3:]] == [
        ["consumed", "windows", "tokens", "epochs", "corpus"],
        ["prose", "1,500", "192,000", "1.50", "data/prose"],
        ["code", "1,000", "128,000", "0.25", "data/code"],
    ]


def test_a_folder_that_is_no_run_has_no_lineage(tmp_path, capsys):
    assert main(["lineage", str(tmp_path)]) == 2
    assert "is no run folder: it has no lineage.json" in capsys.readouterr().err


def test_a_run_that_has_saved_nothing_has_no_ledger(tmp_path, capsys):
    (make_run(tmp_path / "run") / "ledger.json").unlink()
    assert main(["lineage", str(tmp_path / "run")]) == 2
    assert "ledger.json: the run has saved nothing yet, so its ledger is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format_version": 1}', b'{"format_version": 1, "sources": [{}]}', b"\xff"]
)
def test_a_damaged_ledger_is_a_fault(tmp_path, capsys, content):
    (make_run(tmp_path / "run") / "ledger.json").write_bytes(content)
    assert main(["lineage", str(tmp_path / "run")]) == 2
    assert "ledger.json is damaged (" in capsys.readouterr().err


def make_order(folder: Path, windows_a_step: int, num_steps: int, other_from: int = 10**9) -> Path:
    """A run of steps of so many windows, whose windows are others from `other_from` on."""
    folder.mkdir()
    chain, records = START, []
    for step in range(num_steps):
        numbers = range(step * windows_a_step, (step + 1) * windows_a_step)
        chain = lengthen(chain, [("f", n + (n >= other_from), 9) for n in numbers])
        records.append({"step": step + 1, "windows": (step + 1) * windows_a_step, "chain": chain})
    (folder / "order.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def verdict(capsys, one: Path, other: Path) -> tuple[int, str]:
    status = main(["verify-order", str(one), str(other)])
    captured = capsys.readouterr()
    return status, (captured.out + captured.err).strip()


def test_runs_with_other_batches_are_the_same_where_both_have_seen_equally_many(tmp_path, capsys):
    one, other = make_order(tmp_path / "a", 4, 9), make_order(tmp_path / "b", 6, 9)
    status, told = verdict(capsys, one, other)
    assert status == 0
    assert told.startswith("SAME: 36 windows, compared at 3 places; chain ")
    assert told.endswith(lengthen(START, [("f", n, 9) for n in range(36)]))


def test_the_first_place_where_runs_differ_is_told(tmp_path, capsys):
    one, other = make_order(tmp_path / "a", 4, 9), make_order(tmp_path / "b", 6, 9, other_from=13)
    assert verdict(capsys, one, other) == (
        1, "DIFFERENT: the order differs somewhere in the windows up to 24 (step 6 and step 4)",
    )  # fmt: skip


def test_runs_without_a_place_in_common_cannot_be_compared(tmp_path, capsys):
    one, other = make_order(tmp_path / "a", 4, 2), make_order(tmp_path / "b", 6, 1)
    assert verdict(capsys, one, other) == (
        2, "cpt verify-order: the runs have no number of windows in common, so there is nothing to compare",
    )  # fmt: skip


def test_a_folder_without_an_order_is_a_fault(tmp_path, capsys):
    status, told = verdict(capsys, make_order(tmp_path / "a", 4, 2), tmp_path)
    assert (status, told) == (2, f"cpt verify-order: {tmp_path} is no run folder: it has no order.jsonl")


def test_a_damaged_order_is_a_fault(tmp_path, capsys):
    one = make_order(tmp_path / "a", 4, 2)
    (one / "order.jsonl").write_text("{\n{}\n")
    status, told = verdict(capsys, one, one)
    assert status == 2
    assert told.startswith(f"cpt verify-order: {one}/order.jsonl is damaged: ")
