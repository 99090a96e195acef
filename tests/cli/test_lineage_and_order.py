"""`cpt lineage` tells what a run descends from; `cpt verify-order` proves that two runs saw the same."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest

from cpt.cli import main
from cpt.lineage.chain import START, lengthen
from cpt.lineage.ledger import Entry, Ledger, ShareChange, Stop
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


def test_the_tree_and_what_was_consumed_are_printed(tmp_path, capsys):
    base = make_run(tmp_path / "base")
    child = make_run(tmp_path / "child", base)
    make_run(tmp_path / "grandchild", child)
    make_run(tmp_path / "second", base)
    make_run(tmp_path / "stranger")
    assert main(["lineage", str(child)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:8] == [
        f"{base}  (began from nothing)",
        "│    nothing saved",
        f"├─ {child}  (began at step 244 of base)  <-",
        "│  │    nothing saved",
        f"│  └─ {tmp_path}/grandchild  (began at step 244 of child)",
        "│          nothing saved",
        f"└─ {tmp_path}/second  (began at step 244 of base)",
        "        nothing saved",
    ]
    assert lines[8:10] == ["", f"consumed by the lineage of {child}"]
    assert [line.split() for line in lines[10:]] == [
        ["source", "windows", "tokens", "epochs", "corpus"],
        ["prose", "1,500", "192,000", "1.50", "data/prose"],
        ["code", "1,000", "128,000", "0.25", "data/code"],
    ]


def test_changes_of_replays_share_are_told_with_the_reason(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    ledger = Ledger((), (ShareChange("news", 1920, Fraction(315, 1000), "prose", 0.1234567),))
    (run / "ledger.json").write_text(json.dumps(ledger.as_json()))
    assert main(["lineage", str(run)]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "replay 31.5% of stage news from window 1,920 on: prose had lost 0.1235 nats a token"


def test_what_stopped_a_run_is_told_with_the_limit(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    ledger = Ledger().with_stop(Stop("news", 1200, "prose", 0.1234567, 0.1))
    (run / "ledger.json").write_text(json.dumps(ledger.as_json()))
    assert main(["lineage", str(run)]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == (
        "stop_if ended a run after its step 1,200, in stage news: prose had lost 0.1235 nats a token, 0.1 was allowed"
    )


def test_a_run_that_is_given_twice_is_shown_once(tmp_path, capsys):
    base = make_run(tmp_path / "base")
    (tmp_path / "again").symlink_to(base)
    assert main(["lineage", str(base), str(base), str(tmp_path / "again")]) == 0
    out = capsys.readouterr().out
    assert out.count("began from nothing") == out.count("consumed by the lineage") == 1


def test_two_runs_of_one_family_are_in_one_tree(tmp_path, capsys):
    base = make_run(tmp_path / "base")
    one, other = make_run(tmp_path / "one", base), make_run(tmp_path / "other", base)
    assert main(["lineage", str(one), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("<-") for line in lines[:6]] == [False, False, True, False, True, False]


def test_a_parent_that_is_gone_is_told(tmp_path, capsys):
    base = make_run(tmp_path / "base")
    child = make_run(tmp_path / "child", base)
    shutil.rmtree(base)
    assert main(["lineage", str(child)]) == 0
    assert f"{child}  (began at step 244 of base, which is not there)  <-" in capsys.readouterr().out


def test_damaged_neighbours_are_passed_by(tmp_path, capsys):
    base = make_run(tmp_path / "base")
    (make_run(tmp_path / "torn", base) / "lineage.json").write_text("{")
    damaged = make_run(tmp_path / "damaged", base) / "checkpoints" / "step-00000003"
    damaged.mkdir(parents=True)
    assert main(["lineage", str(base)]) == 0
    out = capsys.readouterr().out
    assert "torn" not in out
    assert "its checkpoints cannot be read; cpt checkpoint verify tells why" in out


def test_steps_tokens_rate_and_what_was_consumed_are_told_of_each_run(base, child, capsys):
    """`child` has its own folder, so it is found as itself alone, with its ancestor; 12 steps of new, 4 of replay."""
    assert main(["lineage", str(child)]) == 0
    told = [line.strip(" │├└─") for line in capsys.readouterr().out.splitlines()]
    assert told[0] == f"{base}  (began from nothing)"
    assert told[1] == "20 steps, 1,920 tokens, last rate 5.28e-04; consumed 1,920 of prose"
    assert told[3] == "16 steps, 1,536 tokens, last rate 5.77e-04; consumed 1,920 of prose, 1,152 of code"


def test_branches_are_told_from_other_children(base, tmp_path, capsys):
    output = tmp_path / "branch"
    assert main(["branch", str(base), "--at", "20", "--tokens", "99", "--output", str(output)]) == 0
    (output / "ledger.json").write_text((base / "ledger.json").read_text())
    capsys.readouterr()
    assert main(["lineage", str(output)]) == 0
    assert f"{output}  (a branch, left at step 20 of base)  <-" in capsys.readouterr().out


def test_a_folder_that_is_no_run_has_no_lineage(tmp_path, capsys):
    assert main(["lineage", str(tmp_path)]) == 2
    assert "is no run folder: it has no lineage.json" in capsys.readouterr().err


def test_a_run_that_has_saved_nothing_has_no_ledger(tmp_path, capsys):
    (make_run(tmp_path / "run") / "ledger.json").unlink()
    assert main(["lineage", str(tmp_path / "run")]) == 2
    told = capsys.readouterr()
    assert "ledger.json: the run has saved nothing yet, so its ledger is empty" in told.err
    assert told.out.startswith(f"{tmp_path}/run  (began from nothing)")  # it stands in the tree all the same


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
