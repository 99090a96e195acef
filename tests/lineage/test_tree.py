"""The tree of runs survives being moved, and ends where a parent is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cpt.config import Fault
from cpt.lineage.tree import Kin, Member, Parent, ancestry, families, read_lineage, write_lineage


def make_run(path: Path, parent: Path | None = None, step: int = 7) -> Path:
    path.mkdir(parents=True)
    write_lineage(path, Parent(parent, step, 1000 * step, 3e-4) if parent else None)
    return path


def names(members: list[Member]) -> list[str]:
    return [member.run.name for member in members]


def test_a_run_without_a_parent_is_alone(tmp_path):
    run = make_run(tmp_path / "base")
    assert read_lineage(run) == Member(run, None)
    assert ancestry(run) == [Member(run, None)]


def test_a_child_knows_its_parent_and_where_it_began(tmp_path):
    base = make_run(tmp_path / "base")
    child = make_run(tmp_path / "deeper/child", base, step=244)
    assert read_lineage(child).parent == Parent(base, 244, 244_000, 3e-4)


def test_ancestry_goes_up_to_the_eldest(tmp_path):
    base = make_run(tmp_path / "base")
    child = make_run(tmp_path / "child", base)
    grandchild = make_run(tmp_path / "grandchild", child)
    assert names(ancestry(grandchild)) == ["grandchild", "child", "base"]


def test_runs_that_are_moved_together_find_each_other(tmp_path):
    base = make_run(tmp_path / "here/runs/base")
    make_run(tmp_path / "here/runs/deeper/child", base)
    shutil.move(tmp_path / "here", tmp_path / "there")
    members = ancestry(tmp_path / "there/runs/deeper/child")
    assert members[1].run == tmp_path / "there/runs/base"


def test_names_relative_to_where_one_stands_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = make_run(Path("runs/base"))
    child = make_run(Path("runs/child"), base)
    assert json.loads((child / "lineage.json").read_text())["parent"]["run"] == "../base"
    monkeypatch.chdir(tmp_path / "runs")
    assert names(ancestry(Path("child"))) == ["child", "base"]


def test_a_run_folder_behind_a_symbolic_link_finds_its_parent(tmp_path):
    (tmp_path / "scratch/deep/er").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/child").symlink_to(tmp_path / "scratch/deep/er")
    base = make_run(tmp_path / "runs/base")
    write_lineage(tmp_path / "runs/child", Parent(base, 1, 2, 0.1))
    assert ancestry(tmp_path / "runs/child")[1].run == base
    assert ancestry(tmp_path / "scratch/deep/er")[1].run == base


def test_ancestry_ends_where_a_parent_is_gone(tmp_path):
    base = make_run(tmp_path / "base")
    child = make_run(tmp_path / "child", base)
    grandchild = make_run(tmp_path / "grandchild", child)
    shutil.rmtree(base)
    assert names(ancestry(grandchild)) == ["grandchild", "child"]
    assert ancestry(grandchild)[-1].parent.run == base


def test_ancestry_ends_where_a_run_would_be_its_own_ancestor(tmp_path):
    base = make_run(tmp_path / "base")
    make_run(tmp_path / "child", base)
    shutil.rmtree(base)
    (tmp_path / "child").rename(base)  # the child under its parent's old name
    assert names(ancestry(base)) == ["base"]


def test_a_folder_that_is_no_run_is_a_fault(tmp_path):
    with pytest.raises(Fault) as caught:
        read_lineage(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is no run folder: it has no lineage.json; name the folder that a run wrote to"
    )


def test_a_lineage_that_cannot_be_read_is_a_fault(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Fault, match=r"file/lineage\.json cannot be read: Not a directory"):
        read_lineage(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"parent": {"run": "x"}}', '{"parent": 3}', '"\\ud800'])
def test_a_damaged_lineage_is_a_fault(tmp_path, text):
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(Fault, match=r"lineage\.json is damaged \(.+\); put it back from a copy of the run"):
        read_lineage(tmp_path)


def test_writing_leaves_nothing_beside_the_file(tmp_path):
    assert [path.name for path in make_run(tmp_path / "run").iterdir()] == ["lineage.json"]


def drawn(kin: Kin) -> tuple[str, list]:
    return kin.member.run.name, [drawn(child) for child in kin.children]


def test_children_are_found_beside_every_run_that_is_known(tmp_path):
    """`far` lies elsewhere and is asked for; its sister is found beside it, and the sister's child beside that."""
    base = make_run(tmp_path / "runs/base")
    late, early = make_run(tmp_path / "runs/late", base, step=9), make_run(tmp_path / "runs/early", base, step=3)
    far = make_run(tmp_path / "elsewhere/far", early, step=1)
    make_run(tmp_path / "elsewhere/late sister", late, step=1)
    make_run(tmp_path / "runs/stranger")
    expected = ("base", [("early", [("far", [])]), ("late", [("late sister", [])])])
    assert [drawn(kin) for kin in families([far])] == [expected]
    assert [drawn(kin) for kin in families([far, far, base])] == [expected]


def test_runs_of_different_families_are_in_trees_of_their_own(tmp_path):
    one, other = make_run(tmp_path / "a/one"), make_run(tmp_path / "b/other")
    assert [drawn(kin) for kin in families([one, other])] == [("one", []), ("other", [])]


def test_runs_that_would_be_one_anothers_ancestors_are_all_drawn_once(tmp_path):
    one = make_run(tmp_path / "one")
    other = make_run(tmp_path / "other", one)
    write_lineage(one, Parent(other, 7, 7000, 3e-4))
    names_of_all = sorted(name for name, _ in map(drawn, families([one])))
    assert names_of_all == ["one", "other"]
