"""The quickstart's two domains: clean, apart from one another, the same each time, and never half-written."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "configs" / "quickstart" / "standard_library_text.py"

MODULE = '''#!/usr/bin/env python
# Copyright (c) 2001 by Somebody. All rights reserved by that body.

"""Measures boats of every size.

Wrapped lines of one paragraph
are joined into one.

    >>> measure("boat")
    12 metres of boat

Use it like this::

    for every_boat in harbour:
        measure(every_boat)
"""

import os  # short remark at the end of a line

# --------------------------------------
# The keel is measured before the mast,
# because the mast may be down.
#
# length = keel + mast
# --------------------------------------


def measure(boat, unit="é # no comment"):
    """Give the length of a boat as a number of metres."""
    text = """kept


    as it is  # no comment"""
    return len(boat) + len(text)


def later(boat):
    """Nothing is done in this function so far."""


class Boat: "shares its line with the class"


def race(boats, harbour):
    for boat in sorted(boats, key=measure):
        harbour.open(boat)
        boat.sail(harbour.wind)
    return harbour
'''


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("standard_library_text", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up by name
    specification.loader.exec_module(module)
    yield module
    del sys.modules[specification.name]


@pytest.fixture
def library(tmp_path, monkeypatch, script):
    """A small library in place of Python's own."""
    folder = tmp_path / "library"
    for name, text in {
        "boats.py": MODULE,
        "copied.py": MODULE,
        "ships/sails.py": '"""Sails are set here, one after the other."""\ndef hoist(sail):\n    return sail.up()\n',
        "tests/boats.py": '"""Tests of the boats that must not be seen."""\nassert boats\n',
        "site-packages/foreign.py": '"""A foreign package that must not be seen."""\nimport foreign\n',
        "_sysconfigdata_here.py": '"""Variables of this very machine, not seen."""\nbuild = 1\n',
        "map.py": "table = (" + ", ".join(f"'letter {number}'" for number in range(40)) + ")\n",
        "torn.py": "def broken(:\n",
        "pydoc_data/topics.py": "topics = {'power': 'The power operator binds tightly.\\n\\n   x**y = z\\n'}\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "latin.py").write_bytes("# -*- coding: latin-1 -*-\ndef name(boat):\n    return 'é'\n".encode("latin-1"))
    (folder / "not_utf8.py").write_bytes(b"name = '\xe9\xff'\n")
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(folder))
    return folder


def read(path: Path) -> dict[str, dict[str, str]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["id"]: line for line in lines}


def test_prose_is_docstrings_and_comments_without_code_doctests_drawings_and_licences(script, library, tmp_path):
    assert script.main([str(tmp_path / "text")]) == 0
    prose = read(tmp_path / "text" / "prose.jsonl")
    assert prose["prose/boats"]["text"].split("\n\n") == [
        "Measures boats of every size.",
        "Wrapped lines of one paragraph are joined into one.",
        "Use it like this::",
        "The keel is measured before the mast, because the mast may be down.",
        "Give the length of a boat as a number of metres.",
        "Nothing is done in this function so far.",
        "shares its line with the class",
    ]
    assert prose["prose/boats"]["source"] == "boats.py"


def test_each_help_topic_is_a_document_without_its_examples(script, library, tmp_path):
    script.main([str(tmp_path / "text")])
    topic = read(tmp_path / "text" / "prose.jsonl")["prose/topics/power"]
    assert topic["text"] == "The power operator binds tightly."


def test_a_text_that_an_earlier_module_had_is_not_written_twice(script, library, tmp_path):
    script.main([str(tmp_path / "text")])
    assert "prose/copied" not in read(tmp_path / "text" / "prose.jsonl")
    assert "code/copied" not in read(tmp_path / "text" / "code.jsonl")


def test_tests_foreign_packages_and_this_machines_settings_are_left_out(script, library, tmp_path):
    script.main([str(tmp_path / "text")])
    assert set(read(tmp_path / "text" / "prose.jsonl")) == {"prose/boats", "prose/ships/sails", "prose/topics/power"}
    assert set(read(tmp_path / "text" / "code.jsonl")) == {"code/boats", "code/ships/sails", "code/latin"}


def test_code_has_no_comments_and_docstrings_and_keeps_its_layout(script, library, tmp_path):
    script.main([str(tmp_path / "text")])
    expected = (
        'import os\n\n\ndef measure(boat, unit="é # no comment"):\n'
        '    text = """kept\n\n\n    as it is  # no comment"""\n'
        "    return len(boat) + len(text)\n\n\ndef later(boat):\n    pass\n\n\n"
        'class Boat: "shares its line with the class"\n\n\ndef race(boats, harbour):\n'
        "    for boat in sorted(boats, key=measure):\n        harbour.open(boat)\n        boat.sail(harbour.wind)\n"
        "    return harbour\n"
    )
    assert read(tmp_path / "text" / "code.jsonl")["code/boats"]["text"] == expected


@pytest.mark.parametrize("module", ["textwrap", "json.decoder", "argparse"])
def test_a_real_module_is_the_same_program_without_its_docstrings(script, module):
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    tokens = list(script.tokenize.generate_tokens(script.io.StringIO(source).readline))
    stripped = script.strip_prose(source, list(script.docstrings(ast.parse(source))), tokens)
    assert len(stripped) < len(source)
    assert program_without_docstrings(script, stripped) == program_without_docstrings(script, source)


def program_without_docstrings(script, source: str) -> str:
    tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for owner in [node for node in ast.walk(tree) if isinstance(node, owners)]:
        if ast.get_docstring(owner) is not None:
            owner.body = owner.body[1:]
        owner.body = [statement for statement in owner.body if not isinstance(statement, ast.Pass)]
    return ast.dump(tree)


@pytest.mark.parametrize(
    "line", ["x = 3", "measure(boat)", "import os", "for boat in harbour:", "else:", "boat.keel[3]"]
)
def test_a_line_of_commented_out_code_is_known(script, line):
    assert script.is_code(line)


@pytest.mark.parametrize(
    "line", ["return", "note: this", "keel or mast", "Example of use:", "it is not in the harbour"]
)
def test_a_line_of_prose_that_looks_a_little_like_code_stays(script, line):
    assert not script.is_code(line)


def test_the_same_library_gives_the_same_bytes(script, library, tmp_path):
    script.main([str(tmp_path / "one")])
    script.main([str(tmp_path / "two")])
    for name in ("prose.jsonl", "code.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_order_is_shuffled_and_does_not_depend_on_what_else_is_there(script):
    documents = [script.Document(f"code/{number:03}", "", str(number)) for number in range(50)]
    shuffled = script.shuffle(documents)
    assert shuffled != documents
    assert script.shuffle(documents[::2]) == [document for document in shuffled if int(document.text) % 2 == 0]


def test_a_limit_takes_the_head_of_the_whole(script, library, tmp_path):
    script.main([str(tmp_path / "whole")])
    script.main([str(tmp_path / "head"), "--limit-megabytes", "0.0002"])
    whole = (tmp_path / "whole" / "code.jsonl").read_text(encoding="utf-8")
    head = (tmp_path / "head" / "code.jsonl").read_text(encoding="utf-8")
    assert head
    assert head != whole
    assert whole.startswith(head)


def test_one_line_tells_the_counts_and_what_was_left_out(script, library, tmp_path, capsys):
    script.main([str(tmp_path / "text")])
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "prose 3 documents, 0.00 MB; code 3 documents" in told
    assert "left out: 2 tables of data, 2 unreadable modules" in told  # the topics are a table of texts


def test_files_that_are_there_are_kept(script, library, tmp_path, capsys):
    script.main([str(tmp_path)])
    (tmp_path / "prose.jsonl").write_text("mine\n")
    capsys.readouterr()
    assert script.main([str(tmp_path)]) == 0
    assert "are there already; remove them to write them anew" in capsys.readouterr().out
    assert (tmp_path / "prose.jsonl").read_text() == "mine\n"


def test_one_file_of_the_two_is_not_enough(script, library, tmp_path):
    script.main([str(tmp_path)])
    whole = (tmp_path / "code.jsonl").read_bytes()
    (tmp_path / "code.jsonl").unlink()
    script.main([str(tmp_path)])
    assert (tmp_path / "code.jsonl").read_bytes() == whole


def test_a_write_that_fails_leaves_nothing_behind(script, library, tmp_path, monkeypatch, capsys):
    def disk_full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.os, "replace", disk_full)
    assert script.main([str(tmp_path / "text")]) == 2
    assert "No space left on device; name a folder you may write to" in capsys.readouterr().err
    assert list((tmp_path / "text").iterdir()) == []


def test_a_folder_that_cannot_be_written_gives_one_line_and_status_2(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-I", str(SCRIPT), str(tmp_path / "file")]  # -I: nothing of ours on the path
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"cannot write to {tmp_path / 'file'}: File exists; name a folder you may write to\n"


def test_a_python_without_sources_gives_one_line_and_status_2(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    assert script.main([str(tmp_path / "text")]) == 2
    assert "holds no readable Python source; use a Python that carries its library" in capsys.readouterr().err
    assert not (tmp_path / "text" / "prose.jsonl").exists()


@pytest.mark.parametrize("limit", ["0", "-1", "many", "nan"])
def test_a_limit_that_is_no_size_is_refused(script, tmp_path, capsys, limit):
    with pytest.raises(SystemExit) as ended:
        script.main([str(tmp_path), f"--limit-megabytes={limit}"])
    assert ended.value.code == 2
    assert f"{limit} is not a number of megabytes above 0" in capsys.readouterr().err
