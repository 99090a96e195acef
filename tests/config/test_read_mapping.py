"""Command-line words become one mapping: files merged left to right, then key=value."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.config import Fault, read_mapping


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_no_words_make_an_empty_mapping():
    assert read_mapping([]) == {}


def test_files_are_merged_left_to_right_and_key_by_key(file):
    first = file("seed: 1\nbatch: {windows: 4, micro_batch: 2}\n", "a.yaml")
    second = file("batch: {windows: 8}\nzero: 2\n", "b.yaml")
    assert read_mapping([first, second]) == {"seed": 1, "batch": {"windows": 8, "micro_batch": 2}, "zero": 2}
    assert read_mapping([second, first])["batch"] == {"windows": 4, "micro_batch": 2}


def test_words_come_after_files_wherever_they_stand_later(file):
    assert read_mapping([file("seed: 1\n"), "seed=2", "batch.windows=64", "seed=3"]) == {
        "seed": 3,
        "batch": {"windows": 64},
    }


@pytest.mark.parametrize(
    ("word", "mapping"),
    [
        ("a=1", {"a": 1}),
        ("a=3e-4", {"a": 3e-4}),
        ("a=", {"a": None}),
        ("a=null", {"a": None}),
        ("a=no", {"a": "no"}),
        ("a=true", {"a": True}),
        ("a={x: 1, y: [2]}", {"a": {"x": 1, "y": [2]}}),
        ("a=b=c", {"a": "b=c"}),
        ("a.b.c=25%", {"a": {"b": {"c": "25%"}}}),
        ("output=/runs/a=b/c", {"output": "/runs/a=b/c"}),
    ],
)
def test_a_word_is_a_key_and_a_yaml_value(word, mapping):
    assert read_mapping([word]) == mapping


def test_a_word_longer_than_a_file_name_can_be_is_still_a_word():
    assert read_mapping([f"deepspeed.comment={'x' * 5000}"]) == {"deepspeed": {"comment": "x" * 5000}}


def test_a_file_whose_name_has_an_equals_sign_is_a_file(file):
    assert read_mapping([file("seed: 5\n", "lr=3e-4.yaml")]) == {"seed": 5}


def test_a_number_reaches_into_a_list(file):
    words = [file("stages:\n- {name: a, tokens: 1}\n- {name: b, tokens: 2}\n"), "stages.1.tokens=5", "stages.0.x.y=7"]
    assert read_mapping(words) == {"stages": [{"name": "a", "tokens": 1, "x": {"y": 7}}, {"name": "b", "tokens": 5}]}


def test_a_list_entry_can_be_replaced_as_a_whole(file):
    assert read_mapping([file("a: [1, 2]\n"), "a.1=3"]) == {"a": [1, 3]}


def test_a_number_beyond_the_list_is_a_fault_that_names_the_whole_place(file):
    with pytest.raises(Fault, match=r"^run\.stages\.2: the list has 2 entries, counted from 0$"):
        read_mapping([file("run: {stages: [{}, {}]}\n"), "run.stages.2.tokens=5"])


@pytest.mark.parametrize("before", ["[1]", "{a: 1}", "3"])
def test_an_empty_mapping_empties_what_was_there(file, before):
    assert read_mapping([file(f"x: {before}\n"), "x={}"]) == {"x": {}}


def test_another_choice_keeps_nothing_of_the_old_one(file):
    words = [file("schedule: {name: cosine, peak: 1, floor: 0.1}\n"), "schedule={name: constant, peak: 2}"]
    assert read_mapping(words) == {"schedule": {"name": "constant", "peak": 2}}


def test_the_same_choice_is_merged(file):
    words = [file("schedule: {name: cosine, peak: 1, floor: 0.1}\n"), "schedule={name: cosine, peak: 2}"]
    assert read_mapping(words) == {"schedule": {"name": "cosine", "peak": 2, "floor": 0.1}}


def test_changing_one_use_of_an_anchor_leaves_the_other(file):
    words = [file("a: &s {peak: 1}\nb: *s\n"), "a.peak=5"]
    assert read_mapping(words) == {"a": {"peak": 5}, "b": {"peak": 1}}


def test_reading_twice_gives_equal_mappings(file):
    words = [file("stages: [{tokens: 1}]\n"), "stages.0.tokens=5"]
    assert read_mapping(words) == read_mapping(words)


def test_an_empty_file_says_nothing(file):
    assert read_mapping([file("# only a comment\n")]) == {}


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(file):
    assert read_mapping([file(b"\xef\xbb\xbfseed: 1\r\nzero: 2\r\n")]) == {"seed": 1, "zero": 2}


def test_a_missing_file_is_a_fault():
    with pytest.raises(Fault, match=r"nowhere\.yaml: there is no such file; name a YAML file of settings"):
        read_mapping(["nowhere.yaml"])


def test_a_folder_is_a_fault_that_offers_its_run_yaml(tmp_path):
    with pytest.raises(Fault, match=r"is a folder; name a YAML file of settings, such as .*/run\.yaml$"):
        read_mapping([str(tmp_path)])


def test_a_file_that_cannot_be_read_is_a_fault(file):
    with pytest.raises(Fault, match=r"run\.yaml/deeper cannot be read: Not a directory"):
        read_mapping([file("a: 1") + "/deeper"])


def test_a_file_that_is_not_utf_8_is_a_fault_with_the_byte(file):
    with pytest.raises(Fault, match=r"run\.yaml is not UTF-8 text: byte 6; save it as UTF-8"):
        read_mapping([file("name: é\n".encode("latin-1"))])


def test_a_file_that_is_not_yaml_is_a_fault_with_the_line(file):
    with pytest.raises(Fault, match=r"run\.yaml: line 2: not YAML: mapping values are not allowed here"):
        read_mapping([file("a: 1\nb: c: d\n")])


def test_a_file_that_holds_no_mapping_is_a_fault(file):
    with pytest.raises(Fault, match=r"run\.yaml: settings are 'key: value' lines, this file holds a list"):
        read_mapping([file("- 1\n- 2\n")])


@pytest.mark.parametrize("word", ["=5", ".a=5", "a.=5", "a..b=5"])
def test_a_word_without_a_key_is_a_fault(word):
    with pytest.raises(Fault) as caught:
        read_mapping([word])
    assert str(caught.value) == f"{word}: write it as key=value, such as seed=2 or batch.windows=64"


def test_a_value_that_is_not_yaml_is_a_fault():
    with pytest.raises(Fault) as caught:
        read_mapping(["a=[1,"])
    assert str(caught.value) == "a=[1,: the value is not YAML; quote it, such as a='text'"


def test_all_faults_of_all_words_are_told_at_once(file):
    with pytest.raises(Fault) as caught:
        read_mapping(["one.yaml", file("- 1\n"), "=2", "fine=1", "a=[", "two.yaml"])
    assert len(caught.value.lines) == 5
    assert [Path(line.split(":")[0]).name for line in caught.value.lines] == [
        "one.yaml", "run.yaml", "=2", "a=[", "two.yaml",
    ]  # fmt: skip


def test_words_are_merged_into_a_copy_of_what_lies_beneath():
    beneath = {"a": {"b": 1, "c": 2}}
    assert read_mapping(["a.b=3"], beneath) == {"a": {"b": 3, "c": 2}}
    assert beneath == {"a": {"b": 1, "c": 2}}
