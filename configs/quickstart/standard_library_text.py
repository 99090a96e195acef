"""Writes two small text domains that every machine has: the English and the Python of Python's own standard library.

    python configs/quickstart/standard_library_text.py OUTPUT_FOLDER [--limit-megabytes N]

OUTPUT_FOLDER/prose.jsonl   docstrings, comments and the help topics, without code: one document a module or topic
OUTPUT_FOLDER/code.jsonl    the same modules without docstrings and comments: one document a module

Each line is {"text": ..., "id": ..., "source": ...}. The order is shuffled by a hash of the id, so the head of a file
is a fair sample of it, and the files depend on nothing but the version of Python. Needs the standard library only, so
it runs before the package is installed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import io
import json
import keyword
import os
import re
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NUM_LEAST_WORDS = 4  # a shorter comment is a label, not prose
LARGEST_SHARE_OF_LITERALS = 0.5  # more is a table (character maps, generated data), not a program
LARGEST_SHARE_OF_SYMBOLS = 0.1  # more is an example, a grammar or a drawing, not prose
SHUFFLE_SEED = "standard library text 1"

LICENCE = re.compile(
    r"copyright|\(c\) ?\d{4}|all rights reserved|licen[sc]ed (to|under)|warrant(y|ies)|in no event shall"
    r"|permission to use|redistribution and use|provided \"?as is",
    re.IGNORECASE,
)
SYMBOLS = re.compile(r"[^\w\s.,;:!?'\"()`-]|_(?!\w)|\(\)")
BULLET = re.compile(r"([-*+o]|\(?\w{1,2}[.)])\s")
SENTENCE_LIKE = re.compile(r"[A-Za-z]{2,}")
TWO_WORDS = re.compile(r"([A-Za-z]+) ([A-Za-z]+)\b(?!['\"])")
PYTHON_WORDS = {*keyword.kwlist, *keyword.softkwlist}
UNDERLINE = re.compile(r"[\s=~^\"'#*+_.-]{3,}")

Docstring = tuple[ast.Expr, bool]  # where it stands, and whether it is all the body there is


@dataclass(frozen=True)
class Document:
    """One line of an output file."""

    id: str
    source: str
    text: str


def main(arguments: list[str] | None = None) -> int:
    """Writes both files unless they are there; 0 when they are, 2 when they cannot be written."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example: python standard_library_text.py runs/quickstart/text"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT_FOLDER", help="where prose.jsonl and code.jsonl go")
    parser.add_argument("--limit-megabytes", type=positive_number, metavar="N", help="at most N MB in each file")
    options = parser.parse_args(arguments)
    outputs = {"prose": options.output / "prose.jsonl", "code": options.output / "code.jsonl"}
    try:
        if all(path.is_file() for path in outputs.values()):
            print(f"{outputs['prose']} and {outputs['code']} are there already; remove them to write them anew")
            return 0
        options.output.mkdir(parents=True, exist_ok=True)
        return write_domains(outputs, options.limit_megabytes)
    except OSError as error:
        print(
            f"cannot write to {options.output}: {error.strerror or error}; name a folder you may write to",
            file=sys.stderr,
        )
        return 2


def positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of megabytes above 0")
    return number


def write_domains(outputs: dict[str, Path], limit_megabytes: float | None) -> int:
    library = Path(sysconfig.get_path("stdlib"))
    domains, num_skipped = read_library(library)
    if not all(domains.values()):
        print(f"{library} holds no readable Python source; use a Python that carries its library", file=sys.stderr)
        return 2
    told = []
    for domain, documents in domains.items():
        chosen = take_head(shuffle(drop_duplicates(documents)), limit_megabytes)
        num_bytes = write_aside_then_rename(outputs[domain], chosen)
        told.append(f"{domain} {len(chosen)} documents, {num_bytes / 1e6:.2f} MB")
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(num_skipped.items())) or "none"
    print(f"{'; '.join(told)}; from {library}; left out: {skipped}")
    return 0


def read_library(library: Path) -> tuple[dict[str, list[Document]], Counter[str]]:
    """The documents of both domains in the order of the paths, and how many modules were left out for which reason."""
    prose: list[Document] = []
    code: list[Document] = []
    num_skipped: Counter[str] = Counter()
    seen_paragraphs: set[str] = set()
    for path in module_paths(library):
        module = path.relative_to(library).as_posix()
        try:
            with tokenize.open(path) as file:
                source = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(source)
                tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
                found = list(docstrings(tree))
                stripped = strip_prose(source, found, tokens)
                ast.parse(stripped)
        except (SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError):
            num_skipped["unreadable modules"] += 1
            continue
        if module == "pydoc_data/topics.py":
            prose += help_topics(tree, module, seen_paragraphs)
        text = join_new_paragraphs(prose_paragraphs(found, tokens), seen_paragraphs)
        if text:
            prose.append(Document(f"prose/{module[:-3]}", module, text))
        if share_of_literals(tokens) > LARGEST_SHARE_OF_LITERALS:
            num_skipped["tables of data"] += 1
        elif stripped.strip():
            code.append(Document(f"code/{module[:-3]}", module, stripped))
    return {"prose": prose, "code": code}, num_skipped


def module_paths(library: Path) -> list[Path]:
    """Every module that describes Python rather than this machine, sorted by path."""
    found = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        # _sysconfigdata holds the paths and flags with which this very Python was built.
        found += [
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found, key=lambda path: path.relative_to(library).as_posix())


# ---- prose


def help_topics(tree: ast.Module, module: str, seen_paragraphs: set[str]) -> list[Document]:
    """One document for each topic of `help()`; the module is one dictionary of texts."""
    documents = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                joined = join_new_paragraphs(clean_paragraphs(text), seen_paragraphs)
                if joined:
                    documents.append(Document(f"prose/topics/{topic}", module, joined))
    return documents


def prose_paragraphs(found: list[Docstring], tokens: list[tokenize.TokenInfo]) -> list[str]:
    """Docstrings and comments of one module as clean paragraphs, in the order in which they stand in the file."""
    pieces = [(node.lineno, clean_paragraphs(inspect.cleandoc(node.value.value))) for node, _ in found]
    pieces += [(line, clean_paragraphs(text)) for line, text in comment_blocks(tokens)]
    return [paragraph for _, paragraphs in sorted(pieces, key=lambda piece: piece[0]) for paragraph in paragraphs]


def docstrings(tree: ast.Module) -> Iterator[Docstring]:
    """The docstrings of a module, its classes and its functions."""
    for owner in ast.walk(tree):
        if isinstance(owner, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and owner.body:
            first = owner.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first, len(owner.body) == 1 and not isinstance(owner, ast.Module)


def comment_blocks(tokens: list[tokenize.TokenInfo]) -> Iterator[tuple[int, str]]:
    """Comments that stand alone on consecutive lines, as (first line, text); `#` and what is glued to it is cut off."""
    first_line, last_line, lines = 0, -1, []
    for token in tokens:
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip() or token.string.startswith("#!"):
            continue
        if token.start[0] != last_line + 1 and lines:
            yield first_line, inspect.cleandoc("\n".join(lines))
            lines = []
        first_line = first_line if lines else token.start[0]
        last_line = token.start[0]
        lines.append(token.string.lstrip("#!:").rstrip())
    if lines:
        yield first_line, inspect.cleandoc("\n".join(lines))


def clean_paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring, comment or topic that are prose: no doctests, code, drawings or licences.

    Wrapped lines are joined, so that a paragraph is one line; each item of a list begins a line of its own.
    """
    paragraphs = []
    example_indent = None  # of the block after a paragraph that ends in `::`
    for block in re.split(r"\n[ \t]*\n", text.expandtabs()):
        indent = len(block.lstrip("\n")) - len(block.strip())
        if example_indent is not None and indent > example_indent:
            continue
        example_indent = indent if block.rstrip().endswith("::") else None
        if any(does_something(statement) for statement in statements(textwrap.dedent(block))):
            continue
        lines = [line.strip() for line in block.split("\n")]
        doctest = next((number for number, line in enumerate(lines) if line.startswith(">>>")), len(lines))
        lines = [line for line in lines[:doctest] if line and not UNDERLINE.fullmatch(line) and not is_code(line)]
        joined = ""
        for line in lines:
            joined += line if not joined else ("\n" if BULLET.match(line) else " ") + line
        if is_prose(joined):
            paragraphs.append(re.sub(r" {2,}", " ", joined))
    return paragraphs


def is_code(line: str) -> bool:
    """Whether a line would run as Python and do something; a word, `a or b` or `note: this` reads as prose."""
    first_words = TWO_WORDS.match(line)
    if line.isidentifier() or (first_words and not PYTHON_WORDS & set(first_words.groups())):
        return False  # two plain words in a row are never Python; this spares most lines the parser
    if line.endswith(":"):
        return any(statements(start + line + " pass") for start in ("", "if x: pass\n", "try: pass\n"))
    return any(does_something(statement) for statement in statements(line))


def statements(text: str) -> list[ast.stmt]:
    """The statements of a text; none where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text).body
    except (SyntaxError, ValueError):
        return []


def does_something(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, (ast.Call, ast.Subscript, ast.Attribute, ast.List, ast.Dict, ast.BinOp))
    return not (isinstance(statement, ast.AnnAssign) and statement.value is None)


def is_prose(paragraph: str) -> bool:
    words = SENTENCE_LIKE.findall(paragraph)
    if len(words) < NUM_LEAST_WORDS or LICENCE.search(paragraph):
        return False
    num_visible = len(re.sub(r"\s", "", paragraph))
    return len(SYMBOLS.findall(paragraph)) <= LARGEST_SHARE_OF_SYMBOLS * num_visible


def join_new_paragraphs(paragraphs: list[str], seen: set[str]) -> str:
    """The paragraphs that no earlier document had, one text; adds them to `seen`."""
    new = []
    for paragraph in paragraphs:
        key = " ".join(paragraph.lower().split())
        if key not in seen:
            seen.add(key)
            new.append(paragraph)
    return "\n\n".join(new)


# ---- code


def strip_prose(source: str, found: list[Docstring], tokens: list[tokenize.TokenInfo]) -> str:
    """The source without comments and docstrings; a body that was only a docstring becomes `pass`.

    Works on whole lines and keeps the author's layout. A docstring that shares its line with code stays.
    """
    original = source.split("\n")  # not splitlines(), which cuts at \f as well
    lines: list[str | None] = list(original)  # None: a line that goes
    inside_strings = set()
    for token in tokens:
        row, column = token.start
        if token.type == tokenize.COMMENT:
            kept = lines[row - 1][:column].rstrip()
            lines[row - 1] = kept or None
        elif token.end[0] > row and token.string.strip():
            inside_strings.update(range(row, token.end[0] + 1))
    for node, is_whole_body in found:
        before = original[node.lineno - 1][: node.col_offset]
        after = (lines[node.end_lineno - 1] or "").encode()[node.end_col_offset :]
        if before.strip() or after.strip():
            continue
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
        if is_whole_body:
            lines[node.lineno - 1] = before + "pass"
    kept_lines: list[str] = []
    num_blank = 2
    for number, line in enumerate(lines, start=1):
        if line is None:
            continue
        if number not in inside_strings:
            line = line.rstrip()
            num_blank = num_blank + 1 if not line else 0
            if num_blank > 2:
                continue
        else:
            num_blank = 0
        kept_lines.append(line)
    return "\n".join(kept_lines).strip("\n") + "\n"


def share_of_literals(tokens: list[tokenize.TokenInfo]) -> float:
    """Share of the visible characters of the code (docstrings and comments aside) that are strings and numbers."""
    num_literal = num_all = 0
    previous = tokenize.NEWLINE
    for token in tokens:
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        num_characters = len(token.string.strip())
        if token.type == tokenize.STRING and previous in (tokenize.NEWLINE, tokenize.INDENT):
            num_characters = 0  # a docstring
        num_all += num_characters
        if token.type in (tokenize.STRING, tokenize.NUMBER):
            num_literal += num_characters
        previous = token.type
    return num_literal / max(num_all, 1)


# ---- output


def drop_duplicates(documents: list[Document]) -> list[Document]:
    first_with_text: dict[str, Document] = {}
    for document in documents:
        first_with_text.setdefault(document.text, document)
    return list(first_with_text.values())


def shuffle(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: hashlib.sha256(f"{SHUFFLE_SEED} {document.id}".encode()).digest())


def take_head(documents: list[Document], limit_megabytes: float | None) -> list[Document]:
    """Documents in order while their text stays below the limit; always at least one."""
    if limit_megabytes is None:
        return documents
    head, num_bytes = [], 0
    for document in documents:
        num_bytes += len(document.text.encode())
        if head and num_bytes > limit_megabytes * 1e6:
            break
        head.append(document)
    return head


def write_aside_then_rename(path: Path, documents: list[Document]) -> int:
    """Writes one JSON object a line; returns the bytes of text in them."""
    aside = path.with_name(path.name + ".part")
    num_bytes = 0
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            for document in documents:
                line = {"text": document.text, "id": document.id, "source": document.source}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                num_bytes += len(document.text.encode())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return num_bytes


if __name__ == "__main__":
    sys.exit(main())
