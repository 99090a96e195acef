"""A mapping becomes a frozen dataclass: every kind of value, every fault at once, and back again."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pytest

from cpt.config import (
    Fault,
    Length,
    as_mapping,
    build,
    chosen_from,
    name_of_choice,
    names_of_choices,
    read_mapping,
    read_settings,
    write_yaml,
)
from cpt.config.faults import nearest
from cpt.schedules import constant, cosine


@dataclass(frozen=True)
class Inner:
    needed: int
    spare: str = "none"

    def faults(self) -> list[str]:
        return [] if self.needed >= 0 else [f"needed = {self.needed}: at least 0"]


@dataclass(frozen=True)
class Outer:
    tokens: int = 1
    rate: float = 0.5
    share: Fraction = Fraction(0)
    is_on: bool = False
    text: str = ""
    place: Path = Path("here")
    level: Literal[0, 1, 2] = 1
    kind: Literal["fast", "slow"] = "fast"
    maybe: int | None = None
    inner: Inner | None = None
    several: tuple[Inner, ...] = ()
    numbers: tuple[float, ...] = ()
    by_name: dict[str, Inner] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    schedule: Any = field(default=constant.Settings(1.0), metadata=chosen_from("cpt.schedules"))
    maybe_schedule: Any | None = field(default=None, metadata=chosen_from("cpt.schedules"))
    schedules: tuple[Any, ...] = field(default=(), metadata=chosen_from("cpt.schedules"))


def faults_of(mapping: Any) -> list[str]:
    with pytest.raises(Fault) as caught:
        read_settings(Outer, mapping)
    return list(caught.value.lines)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("tokens", 7, 7),
        ("tokens", -7, -7),
        ("tokens", "300M", 300_000_000),
        ("tokens", "1.5B", 1_500_000_000),
        ("tokens", "64k", 64_000),
        ("tokens", "2T", 2 * 10**12),
        ("tokens", "1_000K", 1_000_000),
        ("tokens", "1_000", 1000),
        ("tokens", 3.0, 3),
        ("tokens", 1e6, 1_000_000),
        ("tokens", "2e3", 2000),
        ("tokens", 2**70, 2**70),
        ("rate", 3, 3.0),
        ("rate", "3e-4", 3e-4),
        ("rate", 3e-4, 3e-4),
        ("share", 0.1, Fraction(1, 10)),
        ("share", 1, Fraction(1)),
        ("share", "25%", Fraction(1, 4)),
        ("share", "2.5 %", Fraction(1, 40)),
        ("share", "1/3", Fraction(1, 3)),
        ("share", 1e-05, Fraction(1, 100_000)),
        ("is_on", True, True),
        ("text", "no", "no"),
        ("text", 500, "500"),
        ("place", "a/b", Path("a/b")),
        ("place", Path("a"), Path("a")),
        ("place", "~/a", Path.home() / "a"),
        ("level", 2, 2),
        ("kind", "slow", "slow"),
        ("maybe", None, None),
        ("maybe", "1K", 1000),
        ("inner", None, None),
        ("inner", {"needed": "1K"}, Inner(1000)),
        ("several", [{"needed": 1}, {"needed": 2, "spare": "x"}], (Inner(1), Inner(2, "x"))),
        ("several", [], ()),
        ("numbers", [1, "3e-4"], (1.0, 3e-4)),
        ("by_name", {"a": {"needed": 1}, 5: {"needed": 2}}, {"a": Inner(1), "5": Inner(2)}),
        ("anything", {"x": [1, {"y": None}]}, {"x": [1, {"y": None}]}),
        ("schedule", {"name": "constant", "peak": "3e-4"}, constant.Settings(3e-4)),
        ("maybe_schedule", None, None),
        ("maybe_schedule", {"name": "cosine", "peak": 1}, cosine.Settings(1.0)),
        (
            "schedules",
            [{"name": "constant", "peak": 1}, {"name": "cosine", "peak": 2}],
            (constant.Settings(1.0), cosine.Settings(2.0)),
        ),
    ],
)
def test_a_value_is_read_as_the_field_says(name, given, value):
    read = getattr(read_settings(Outer, {name: given}), name)
    assert read == value
    assert type(read) is type(value)


def test_a_level_written_as_1_0_is_the_level_1():
    level = read_settings(Outer, {"level": 1.0}).level
    assert (level, type(level)) == (1, int)


def test_what_is_left_out_stands_at_its_default():
    assert read_settings(Outer, {}) == Outer()


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("tokens", "many", "a whole number, such as 2048 or 300M"),
        ("tokens", 2.5, "a whole number, such as 2048 or 300M"),
        ("tokens", "1.5", "a whole number, such as 2048 or 300M"),
        ("tokens", "K", "a whole number, such as 2048 or 300M"),
        ("tokens", True, "a whole number, such as 2048 or 300M"),
        ("tokens", None, "a whole number, such as 2048 or 300M"),
        ("tokens", [1], "a whole number, such as 2048 or 300M"),
        ("tokens", float("inf"), "a whole number, such as 2048 or 300M"),
        ("rate", "fast", "a number, such as 3e-4"),
        ("rate", True, "a number, such as 3e-4"),
        ("rate", None, "a number, such as 3e-4"),
        ("rate", float("nan"), "a number, such as 3e-4"),
        ("rate", "inf", "a number, such as 3e-4"),
        ("rate", 10**400, "a number, such as 3e-4"),
        ("share", "a quarter", "a share, such as 0.25 or 25%"),
        ("share", "1/0", "a share, such as 0.25 or 25%"),
        ("share", True, "a share, such as 0.25 or 25%"),
        ("share", None, "a share, such as 0.25 or 25%"),
        ("share", float("inf"), "a share, such as 0.25 or 25%"),
        ("is_on", 1, "true or false"),
        ("is_on", "yes", "true or false"),
        ("text", {"a": 1}, "text, in quotes if it looks like a number"),
        ("text", [1], "text, in quotes if it looks like a number"),
        ("text", None, "text, in quotes if it looks like a number"),
        ("text", 1.10, "text, in quotes if it looks like a number"),
        ("text", False, "text, in quotes if it looks like a number"),
        ("place", 7, "a path, in quotes if it looks like a number"),
        ("place", "", "a path, in quotes if it looks like a number"),
        ("place", "~nobody-of-that-name/x", "a path, in quotes if it looks like a number"),
        ("maybe", "x", "a whole number, such as 2048 or 300M"),
        ("several", {"needed": 1}, "a list, got dict"),
        ("several", "x", "a list, got str"),
        ("numbers", None, "a list, got nothing"),
        ("by_name", [1], "'name: value' lines, got list"),
        ("anything", 3, "'name: value' lines, got int"),
        ("inner", 3, "'key: value' lines, got int"),
        ("schedules", {"name": "constant"}, "a list of choices, each with a name"),
        ("schedules", "constant", "a list of choices, each with a name"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_with_its_place_and_what_would_do(name, given, expected):
    assert faults_of({name: given}) == [f"{name} = {given!r}: expected {expected}"]


def test_settings_that_are_no_mapping_are_a_fault():
    assert faults_of([1]) == ["settings = [1]: expected 'key: value' lines, got list"]


def test_a_value_that_is_not_among_the_known_ones_gets_the_near_ones():
    assert faults_of({"kind": "fasd"}) == ["kind = 'fasd' is not known; did you mean fast?"]
    assert faults_of({"level": 7}) == ["level = 7 is not known; known: 0, 1, 2"]
    assert faults_of({"level": True}) == ["level = True is not known; known: 0, 1, 2"]
    assert faults_of({"level": [1]}) == ["level = [1] is not known; known: 0, 1, 2"]


def test_an_unknown_name_is_a_fault_with_the_nearest_names():
    assert faults_of({"tokns": 1}) == ["tokns: there is no such setting; did you mean tokens?"]
    assert faults_of({"inner": {"needed": 1, "zzz": 2}}) == [
        "inner.zzz: there is no such setting; known: needed, spare"
    ]
    assert faults_of({True: 1})[0].startswith("True: there is no such setting; ")


def test_a_missing_value_is_told_where_it_is_missing():
    assert faults_of({"several": [{"needed": 1}, {}]}) == ["several.1.needed is not set; it has no default"]


def test_a_name_that_yaml_takes_for_something_else_is_a_fault():
    assert faults_of({"by_name": {True: {"needed": 1}}}) == [
        "a name in by_name = True: expected text, in quotes if it looks like a number"
    ]


def test_a_choice_says_its_name():
    assert faults_of({"schedule": {"peak": 1}}) == [
        "schedule: say which one by its name, such as {name: ...}; got {'peak': 1}"
    ]
    assert faults_of({"schedule": None}) == ["schedule: say which one by its name, such as {name: ...}; got None"]


def test_an_unknown_choice_gets_the_near_ones():
    assert faults_of({"schedule": "cosin"}) == [
        "schedule.name = cosin: there is no such choice in cpt.schedules; did you mean cosine?"
    ]
    assert faults_of({"schedules": [{"name": "_curves"}]})[0].startswith("schedules.0.name = _curves: there is no such")


def test_a_choice_can_be_its_name_alone():
    assert faults_of({"schedule": "cosine"}) == ["schedule.peak is not set; it has no default"]


def test_an_unknown_setting_of_a_choice_is_told_with_its_place():
    assert faults_of({"schedule": {"name": "cosine", "peak": 1, "flor": 2}}) == [
        "schedule.flor: there is no such setting; did you mean floor?"
    ]


def test_contradictions_that_a_dataclass_finds_are_told_with_their_place():
    mapping = {
        "inner": {"needed": -1},
        "by_name": {"a": {"needed": -2}},
        "schedules": [{"name": "constant", "peak": 0}],
    }
    assert faults_of(mapping) == [
        "inner.needed = -1: at least 0",
        "by_name.a.needed = -2: at least 0",
        "schedules.0.peak = 0.0: above 0",
    ]


def test_all_faults_are_told_at_once():
    mapping = {
        "tokns": 1,
        "rate": "x",
        "inner": {"needed": "y", "spre": 1},
        "several": [{"needed": -1}, {}, 5],
        "schedule": {"name": "cosine", "floor": "z"},
        "kind": "fats",
    }
    assert [line.split(":")[0].split(" = ")[0].split(" is ")[0] for line in faults_of(mapping)] == [
        "tokns", "rate", "kind", "inner.spre", "inner.needed", "several.0.needed", "several.1.needed", "several.2",
        "schedule.peak", "schedule.floor",
    ]  # fmt: skip


FULL = Outer(
    tokens=300_000_000,
    rate=3e-4,
    share=Fraction(1, 3),
    is_on=True,
    text="5e8",
    place=Path("runs/a b"),
    level=2,
    kind="slow",
    maybe=5,
    inner=Inner(1, "no"),
    several=(Inner(1), Inner(2)),
    numbers=(1e-5, 1e16, 0.1),
    by_name={"no": Inner(3), "7": Inner(4)},
    anything={"bucket": 5e8, "text": "2024-01-05", "list": [None, True, "on"]},
    schedule=cosine.Settings(1e-3, 1e-4, Length(5)),
    maybe_schedule=constant.Settings(1.0),
    schedules=(constant.Settings(2.0), cosine.Settings(3.0)),
)


def test_settings_are_written_out_in_full():
    plain = as_mapping(FULL)
    assert plain["share"] == "1/3"
    assert plain["place"] == "runs/a b"
    assert plain["schedule"] == {"name": "cosine", "peak": 1e-3, "floor": 1e-4, "warmup": 5}
    assert [choice["name"] for choice in plain["schedules"]] == ["constant", "cosine"]
    assert as_mapping(Outer(share=Fraction(1, 4)))["share"] == 0.25


@pytest.mark.parametrize("settings", [Outer(), FULL])
def test_settings_survive_the_way_through_a_mapping(settings):
    assert read_settings(Outer, as_mapping(settings)) == settings


@pytest.mark.parametrize("settings", [Outer(), FULL])
def test_settings_survive_the_way_through_a_file(settings, tmp_path):
    write_yaml(settings, tmp_path / "run.yaml", "Two lines\nof comment.")
    assert read_settings(Outer, read_mapping([str(tmp_path / "run.yaml")])) == settings
    assert (tmp_path / "run.yaml").read_text().startswith("# Two lines\n# of comment.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_folder_of_choices_is_its_own_registry():
    assert {"constant", "cosine", "rewarm"} <= set(names_of_choices("cpt.schedules"))
    assert "_curves" not in names_of_choices("cpt.schedules")


def test_a_choice_knows_its_name_and_is_built_from_its_own_file():
    settings = cosine.Settings(1.0)
    assert name_of_choice(settings) == "cosine"
    assert isinstance(build(settings, "Schedule", 100, 0.0), cosine.Schedule)


def test_near_names_are_offered_or_all_if_none_is_near():
    assert nearest("seeed", ["seed", "zero", "need"]) == "did you mean seed or need?"
    assert nearest("xyz", ["b", "a"]) == "known: a, b"


def test_a_fault_keeps_its_lines_apart():
    assert Fault("one").lines == ("one",)
    assert Fault(line for line in "ab").lines == ("a", "b")
    assert str(Fault(["one", "two"])) == "one\ntwo"
    assert issubclass(Fault, ValueError)
