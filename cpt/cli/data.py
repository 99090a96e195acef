"""Text to corpora: train a tokenizer or extend one, build a corpus, pack it, look into it, verify it.

Text comes as .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow or .txt files, as folders and globs of them, or as jsonl
on standard input (named -). A build that was stopped or killed goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cpt.config import Fault
from cpt.data.prepare.build import build_corpus
from cpt.data.prepare.build_report import BuildReport
from cpt.data.prepare.counted import counted
from cpt.data.prepare.extend_tokenizer import ExtensionReport, extend_tokenizer
from cpt.data.prepare.inspect import Inspection, SampleText, inspect_corpus
from cpt.data.prepare.pack import pack_corpus
from cpt.data.prepare.tokenizers import ENGINES
from cpt.data.prepare.train_tokenizer import DEFAULT_KIND, TRAINERS, TokenizerReport, train_tokenizer
from cpt.data.prepare.verify import verify_corpus

EXAMPLE = "cpt data build articles/*.jsonl.gz --tokenizer tokenizer/ --output data/articles --workers 8 --holdout 1%"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_tokenizer(commands)
    _add_build(commands)
    _add_pack(commands)
    _add_inspect(commands)
    _add_verify(commands)


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen subcommand; its exit status."""
    return arguments.data_run(arguments)


def _add_command(
    commands: argparse._SubParsersAction,
    name: str,
    help_line: str,
    example: str,
    function: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_line,
        description=f"{help_line[0].upper()}{help_line[1:]}.",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(data_run=function)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders, globs, or - for jsonl on stdin")
    parser.add_argument("--text-key", default="text", metavar="K", help="key or column of the text (default: text)")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about a faulty line or file: stop, or skip and count it; nothing is taken from a .gz or .zst "
        "file that is damaged or has garbage behind (default: stop)",
    )


def _add_tokenizer(commands: argparse._SubParsersAction) -> None:
    example = "cpt data tokenizer prose.jsonl code.jsonl --output tokenizer/ --vocab-size 8192"
    parser = _add_command(commands, "tokenizer", "train a tokenizer from text, or extend one", example, _train)
    _add_inputs(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="number of entries in all")
    parser.add_argument("--kind", choices=tuple(TRAINERS), help=f"(default: {DEFAULT_KIND})")
    parser.add_argument(
        "--extend",
        metavar="TOKENIZER",
        help="learn further entries on top of this folder's, tokenizer.json's or tokenizer.model's; all its ids stay",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the sample, if the text is long (default: 0)")


def _add_build(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(commands, "build", "build a corpus of token shards from text", EXAMPLE, _build)
    _add_inputs(parser)
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="folder, tokenizer.json or tokenizer.model")
    parser.add_argument("--output", required=True, metavar="CORPUS", help="folder to write, new or empty")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)")
    parser.add_argument(
        "--holdout",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of documents, such as 5%% or 0.05, that goes to CORPUS-held-out; chosen by their text alone",
    )
    parser.add_argument(
        "--shuffle-documents",
        type=int,
        metavar="SEED",
        help="put the documents in an order drawn from this seed; needs room on the disk for the tokens twice",
    )
    parser.add_argument(
        "--domain-key",
        metavar="K",
        help="key or column of the domain: one corpus a domain, CORPUS/DOMAIN; a document without one is faulty",
    )
    parser.add_argument(
        "--id-key",
        metavar="K",
        help="key or column of the id, which then stands in messages about a document; one without it is faulty",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="begin anew; without, a build that was stopped goes on from CORPUS.partial, to the same bytes "
        "(text from standard input always begins anew)",
    )
    parser.add_argument(
        "--append-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put an end-of-document token after documents (default: yes)",
    )
    parser.add_argument("--prepend-bos", action="store_true", help="put a beginning-of-document token before documents")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what tokenizes: the fastest that gives the same ids, or the package tokenizers (default: auto)",
    )


def _add_pack(commands: argparse._SubParsersAction) -> None:
    example = "cpt data pack data/articles --sequence-length 2048 --output data/articles-packed"
    parser = _add_command(
        commands, "pack", "pack whole documents of a corpus into windows of one length", example, _pack
    )
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus that cpt data build made")
    parser.add_argument("--sequence-length", required=True, type=int, metavar="S", help="that of the run to come")
    parser.add_argument("--output", required=True, metavar="PACKED", help="folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=0, help="draws the order of the packed windows (default: 0)")


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "corpus",
        metavar="CORPUS|PREFIX|FILES",
        help="a corpus, PREFIX of PREFIX.bin and PREFIX.idx or of split .bin parts, or raw files: PATH.ds, "
        "PATH.npy:uint16, with :end=ID behind for the token that ends a document",
    )


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands, "inspect", "show counts and sample texts of a corpus", "cpt data inspect data/articles", _inspect
    )
    _add_corpus(parser)
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="of files that do not bring their own, for rates and sample texts"
    )


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(
        commands,
        "verify",
        "look for damage in a corpus; the exit status is 1 if there is any",
        "cpt data verify data/articles",
        _verify,
    )
    _add_corpus(parser)
    parser.add_argument(
        "--vocabulary", type=int, metavar="N", help="no token id may reach this (default: what the manifest says)"
    )


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of documents; write 5% or 0.05")
    return share


def _train(arguments: argparse.Namespace) -> int:
    what = (arguments.inputs, arguments.output, arguments.vocab_size)
    how = {"seed": arguments.seed, "text_key": arguments.text_key, "on_error": arguments.on_error}
    if arguments.extend is None:
        report = train_tokenizer(*what, arguments.kind or DEFAULT_KIND, **how)
        sizes = f"{report.kind}, {report.vocabulary_size:,} entries"
        print(f"trained {report.path}: {sizes}, from {_learned_from(report)}")
        return 0
    if arguments.kind:
        raise Fault(f"--kind = {arguments.kind}: an extended tokenizer is of the kind of {arguments.extend}; leave out")
    extended = extend_tokenizer(arguments.extend, *what, **how)
    sizes = f"{extended.old_size:,} entries and {extended.vocabulary_size - extended.old_size:,} further ones"
    print(f"extended {extended.path}: {sizes}, from {_learned_from(extended)}")
    rates = [extended.sampled_bytes / number for number in (extended.tokens_before, extended.tokens_after)]
    print(f"bytes a token on this text: {rates[0]:.2f} before, {rates[1]:.2f} now")
    return 0


def _learned_from(report: TokenizerReport | ExtensionReport) -> str:
    text = f"{counted(report.num_documents, 'document')}, {_size(report.num_bytes)} of text"
    if report.sampled_bytes == report.num_bytes:
        return text
    return f"a sample of {_size(report.sampled_bytes)} of {text}"


def _build(arguments: argparse.Namespace) -> int:
    report = build_corpus(
        arguments.inputs,
        arguments.tokenizer,
        arguments.output,
        text_key=arguments.text_key,
        workers=arguments.workers,
        append_eos=arguments.append_eos,
        prepend_bos=arguments.prepend_bos,
        holdout=arguments.holdout,
        shuffle_seed=arguments.shuffle_documents,
        id_key=arguments.id_key,
        domain_key=arguments.domain_key,
        on_error=arguments.on_error,
        restart=arguments.restart,
        engine=arguments.engine,
        progress=True,
    )
    for built in filter(None, (report, report.held_out)):
        for part in built.domains or (built,):
            print(f"built {_summary(part)}")
    for cause, count in sorted(report.skipped.items()):
        print(f"skipped {count:,}: {cause}")
    return 0


def _summary(report: BuildReport) -> str:
    return (
        f"{report.path}: {counted(report.num_documents, 'document')}, {counted(report.num_tokens, 'token')}, "
        f"{_size(report.num_bytes)} of text, {report.num_bytes / report.num_tokens:.2f} bytes a token"
    )


def _pack(arguments: argparse.Namespace) -> int:
    report = pack_corpus(
        arguments.corpus, arguments.sequence_length, arguments.output, seed=arguments.seed, progress=True
    )
    length, count = f"{report.sequence_length:,}", report.num_documents
    print(
        f"packed {report.path}: {counted(report.num_bins, 'bin')} of {length} tokens, "
        f"{report.num_padding / report.num_tokens:.2%} padding"
    )
    print(
        f"documents cut: {report.num_cut:,} of {count:,} ({report.num_cut / count:.2%}), each longer than a bin; "
        f"unpacked, windows of {length} tokens cut {report.num_cut_unpacked:,} ({report.num_cut_unpacked / count:.2%})"
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    print("\n".join(_described(inspect_corpus(arguments.corpus, tokenizer=arguments.tokenizer))))
    return 0


def _described(inspection: Inspection) -> list[str]:
    documents, tokens = counted(inspection.num_documents, "document"), counted(inspection.num_tokens, "token")
    shards = f"{counted(inspection.num_shards, 'shard')} of {inspection.dtype}"
    lines = [f"{inspection.name}: {documents}, {tokens} in {shards}"]
    if inspection.num_bytes is not None:
        per_token = f", {inspection.bytes_per_token:.2f} bytes a token" if inspection.num_tokens else ""
        lines.append(f"text: {_size(inspection.num_bytes)}{per_token}")
    if inspection.packed_length:
        padding = inspection.num_padding / inspection.num_tokens
        lines.append(f"packed into bins of {inspection.packed_length:,} tokens, {padding:.2%} padding, each a document")
    percentiles = ", ".join(f"{percent} % {length:,}" for percent, length in inspection.length_percentiles.items())
    lines.append(f"tokens a document, by percentile: {percentiles}")
    rates = _rates(inspection, "ends of documents", inspection.end_rate)
    if rates:
        lines.append(f"of {inspection.sampled_tokens:,} tokens looked at: {rates}")
    if inspection.vocabulary_size is None and not inspection.samples:
        lines.append("no manifest: the tokenizer is not known, so no sample texts; name one with --tokenizer")
    for sample in inspection.samples:
        ending = "[end of document]" if sample.has_end else "[no end of document]"
        lines += [
            "",
            ", ".join(
                filter(
                    None, (f"--- document {sample.document:,}, {counted(sample.num_tokens, 'token')}", _rates(sample))
                )
            )
            + " ---",
            sample.text + (ending if sample.is_whole else f" ... {ending}"),
        ]
    return lines


def _rates(found: Inspection | SampleText, more: str = "", more_rate: float | None = None) -> str:
    rates = {"unknown tokens": found.unknown_rate, "byte-fallback tokens": found.byte_rate, more: more_rate}
    return ", ".join(f"{name} {rate:.4%}" for name, rate in rates.items() if rate is not None)


def _verify(arguments: argparse.Namespace) -> int:
    found = verify_corpus(arguments.corpus, arguments.vocabulary)
    damage = found.damage
    for line in (*found.facts, *damage):
        print(line)
    summary = f"{counted(len(damage), 'fault')} found" if damage else "no damage found"
    print(f"{arguments.corpus}: {summary}")
    return 1 if damage else 0


def _size(num_bytes: int) -> str:
    """A number of bytes for the eye, in decimal units."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return counted(num_bytes, "byte") if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
