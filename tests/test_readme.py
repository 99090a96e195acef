"""What the documents say can be done can be done: commands parse, links and files exist, settings are known."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "configs/quickstart/quickstart.sh"]


def commands_in(text: str) -> list[str]:
    """Every `cpt ...` command of a shell block or of a line that begins with one."""
    return [
        re.split(r"\s+#|\s\|\||;", line.strip())[0].removeprefix("show ")
        for line in text.splitlines()
        if re.match(r"\s*(#\s+)?(show )?cpt [a-z]", line)
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_the_documents_is_understood(document):
    for command in commands_in(document.read_text(encoding="utf-8")):
        words = shlex.split(command.replace("YOUR_TEXT...", "text.jsonl"))[1:]
        module = importlib.import_module(f"cpt.cli.{words[0].replace('-', '_')}")
        parser = argparse.ArgumentParser(exit_on_error=False)
        module.add_arguments(parser)
        parse = parser.parse_args if parser._subparsers else parser.parse_intermixed_args
        parse(words[1:])


def test_the_readme_has_commands_to_check():
    assert len(commands_in((ROOT / "README.md").read_text(encoding="utf-8"))) >= 8


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.suffix == ".md"], ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_every_example_of_a_command_is_understood():
    for path in sorted((ROOT / "cpt/cli").glob("[a-z]*.py")):
        module = importlib.import_module(f"cpt.cli.{path.stem}")
        words = shlex.split(module.EXAMPLE)
        assert words[:2] == ["cpt", path.stem.replace("_", "-")]
        parser = argparse.ArgumentParser(exit_on_error=False)
        module.add_arguments(parser)
        (parser.parse_args if parser._subparsers else parser.parse_intermixed_args)(words[2:])
