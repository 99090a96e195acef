"""YAML is read as version 1.2 means it, and what is written reads alike everywhere."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cpt.config import Fault
from cpt.config.yaml_text import from_yaml, to_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("3e-4", 3e-4),
        ("5e8", 5e8),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2.5E+3", -2500.0),
        ("0100", 100),
        ("-7", -7),
        ("1_000_000", 1_000_000),
        ("2024-01-05", "2024-01-05"),
        ("2024-13-45", "2024-13-45"),
        ("12:30", "12:30"),
        ("300M", "300M"),
        ("25%", "25%"),
        ("~", None),
        ("null", None),
        ("", None),
        ("~/runs", "~/runs"),
        ("0x1F", "0x1F"),
        ("'5e8'", "5e8"),
        ("[1, {a: no}]", [1, {"a": "no"}]),
    ],
)
def test_a_word_means_what_version_1_2_says(text, value):
    read = from_yaml(text)
    assert read == value
    assert type(read) is type(value)


def test_a_name_that_stands_there_twice_is_a_fault_with_its_line():
    with pytest.raises(Fault, match=r"^line 3: not YAML: seed stands here twice$"):
        from_yaml("seed: 1\nzero: 1\nseed: 2\n")


def test_a_name_that_stands_twice_deep_within_is_found_too():
    with pytest.raises(Fault, match=r"^line 2: not YAML: b stands here twice$"):
        from_yaml("list:\n- {a: {b: 1, c: 2, b: 3}}\n")


def test_the_same_name_in_two_mappings_is_no_fault():
    assert from_yaml("a: {x: 1}\nb: {x: 1}") == {"a": {"x": 1}, "b": {"x": 1}}


def test_merge_keys_still_merge():
    assert from_yaml("base: &b {x: 1, y: 2}\nchild: {<<: *b, y: 3}") == {
        "base": {"x": 1, "y": 2},
        "child": {"x": 1, "y": 3},
    }


def test_an_anchor_used_twice_makes_two_things():
    read = from_yaml("a: &s {x: [1]}\nb: *s")
    read["a"]["x"].append(2)
    assert read == {"a": {"x": [1, 2]}, "b": {"x": [1]}}


def test_something_that_holds_itself_is_a_fault():
    with pytest.raises(Fault, match="something in it holds itself"):
        from_yaml("a: &s {x: *s}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: [1,\nc: 2\n", "line 4: not YAML: expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "line 2: not YAML: "),
        ("a: 1\nb: '\x00'\n", "line 2: not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("a: !!int x\n", "not YAML: invalid literal"),
        ("a: !!python/object:os.system {}\n", "line 1: not YAML: could not determine a constructor"),
        ("a: *nowhere\n", "line 1: not YAML: found undefined alias"),
    ],
)
def test_what_is_not_yaml_is_told_in_one_line_with_its_number(text, told):
    with pytest.raises(Fault) as caught:
        from_yaml(text)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
    | st.from_regex(r"[-+]?[0-9_.eE:xo-]{1,8}", fullmatch=True)
    | st.sampled_from(["no", "On", "y", "~", "null", "NaN", ".inf", "2024-01-05", "5e8", "08", "=", "<<", "a: b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abn5", max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(PLAIN)
def test_what_is_written_is_read_back_equal_under_both_versions_of_yaml(plain):
    text = to_yaml({"value": plain})
    for read in (from_yaml(text), yaml.safe_load(text)):
        assert read == {"value": plain}
        assert repr(read) == repr({"value": plain})


def test_what_is_written_keeps_its_order_and_has_no_anchors():
    twice = {"x": [1]}
    assert to_yaml({"b": twice, "a": twice}) == "b:\n  x:\n  - 1\na:\n  x:\n  - 1\n"
