"""A tokenizer with further entries, learned from new text on top of the old ones: every old id keeps its meaning.

BPE is continued: the old merges keep their ranks and new ones follow, so a text is first cut as before and then joined
further. It never takes more tokens than before.

    tokenizer.json     pieces and merges are added to the file; nothing else in it changes
    tokenizer.model    SentencePiece: pieces are added with scores below the old ones, to the same effect

Text that falls back on bytes gets pieces for its characters first. Nothing is written unless the new folder opens and
passes `check_extension`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from cpt.config import Fault
from cpt.data.prepare import long_texts
from cpt.data.prepare.aside import written_aside
from cpt.data.prepare.further_merges import CutTexts, Learned
from cpt.data.prepare.pieces import ModelProto, Piece, Vocabulary, merges_of, read_proto
from cpt.data.prepare.tokenizers import SENTENCEPIECE_MODEL, TOKENIZER_JSON, Tokenizer
from cpt.data.prepare.train_tokenizer import sample_of

logger = logging.getLogger(__name__)

# Companions that hold the vocabulary itself; they would tell of the old one.
_OLD_VOCABULARY = ("vocab.json", "merges.txt")


@dataclass(frozen=True)
class ExtensionReport:
    """What was learned, on how much of the text (UTF-8 bytes), and how many tokens the sampled text took and takes."""

    path: Path
    old_size: int
    vocabulary_size: int
    num_documents: int
    num_bytes: int
    sampled_documents: int
    sampled_bytes: int
    tokens_before: int
    tokens_after: int


def extend_tokenizer(
    base: str | Path,
    inputs: Sequence[str | Path],
    output: str | Path,
    vocabulary_size: int,
    *,
    sample_bytes: int = 100_000_000,
    seed: int = 0,
    text_key: str = "text",
    on_error: str = "stop",
) -> ExtensionReport:
    """Extends the tokenizer `base` to `vocabulary_size` entries in all; its folder appears whole or not at all.

    New ids begin after all old ones, added tokens included. The same input gives the same bytes. `sample_bytes`, `seed`
    and what is read of `inputs` are as in `train_tokenizer`.

    Raises Fault if the output is in use, the tokenizer is of a kind that cannot be extended, or the text too short or
    the size too small for further entries.
    """
    old = Tokenizer.open(base)
    vocabulary = Vocabulary.of(old)
    if vocabulary_size <= vocabulary.size:
        raise Fault(
            f"{old.deciding_file} has {vocabulary.size:,} entries already; --vocab-size is the new total, "
            f"{vocabulary.size + 1} or more"
        )
    with written_aside(output) as folder:
        sample = sample_of(inputs, sample_bytes, seed, text_key, on_error)
        texts = sample.texts()
        num_new = vocabulary_size - vocabulary.size
        logger.info("learning %s further entries from %s bytes of text", f"{num_new:,}", f"{sample.sampled_bytes:,}")
        learned = _learn(old, vocabulary, texts, num_new)
        if len(learned.pieces) < num_new:
            largest = vocabulary.size + len(learned.pieces)
            raise Fault(
                f"a vocabulary of {vocabulary_size:,} is too large for this text, which yields {largest:,} entries at "
                f"most; use --vocab-size {largest} or less, or more text"
            )
        _write(old, vocabulary, learned, folder)
        tokens_before, tokens_after = check_extension(old, Tokenizer.open(folder), texts)
        _leave_out_other_model(folder, texts)
    return ExtensionReport(
        Path(output),
        vocabulary.size,
        vocabulary_size,
        sample.num_documents,
        sample.num_bytes,
        len(texts),
        sample.sampled_bytes,
        tokens_before,
        tokens_after,
    )


def check_extension(old: Tokenizer, new: Tokenizer, texts: Sequence[str]) -> tuple[int, int]:
    """Tokens that the texts take in the old tokenizer and in the new one.

    Raises Fault if an old id means something else, if a text does not come back as it did, or takes more tokens.
    """
    faults = []
    difference = Vocabulary.of(new).difference_from(Vocabulary.of(old))
    if difference:
        faults.append(f"old ids would change: {difference}")
    before = after = 0
    for text in texts:
        ids, new_ids = old.encode(text), new.encode(text)
        if new.decode(new_ids) != old.decode(ids):
            faults.append(f"a text would not come back: {_beginning(text)}")
        if new_ids.size > ids.size:
            faults.append(f"a text would take {new_ids.size:,} tokens and not {ids.size:,}: {_beginning(text)}")
        before, after = before + ids.size, after + new_ids.size
        if faults:
            raise Fault([f"{old.deciding_file} cannot be extended:", *faults])
    return before, after


def _beginning(text: str) -> str:
    return repr(text[:60])


def _learn(old: Tokenizer, vocabulary: Vocabulary, texts: list[str], num_new: int) -> Learned:
    cut_texts = CutTexts(vocabulary)
    path = str(old.deciding_file)
    if old.usual_name == SENTENCEPIECE_MODEL:
        model = sentencepiece.SentencePieceProcessor(model_file=path)

        def cut(text: str) -> tuple[np.ndarray, np.ndarray | None]:
            return np.array(model.encode(text), dtype=np.int32), None
    else:
        reference = tokenizers.Tokenizer.from_file(path)
        reference.no_truncation()
        reference.no_padding()

        def cut(text: str) -> tuple[np.ndarray, np.ndarray | None]:
            encoding = reference.encode(text, add_special_tokens=False)
            return np.array(encoding.ids, dtype=np.int32), np.array(encoding.word_ids, dtype=np.int32)

    for text in texts:
        # Only those longer than the engine takes at once are cut; a word or two may be lost at a cut.
        for start in range(0, len(text), long_texts.LONGEST_AT_ONCE):
            part = text[start : start + long_texts.LONGEST_AT_ONCE]
            cut_texts.add(part, *cut(part))
    return cut_texts.learn(num_new)


def _write(old: Tokenizer, vocabulary: Vocabulary, learned: Learned, folder: Path) -> None:
    """The extended tokenizer's files, and of the others those that are still true."""
    for file in old.files:
        if file == old.deciding_file and old.usual_name == TOKENIZER_JSON:
            _write_json(file, vocabulary, learned, folder / TOKENIZER_JSON)
        elif file == old.deciding_file:
            _write_model(read_proto(file), learned, folder / SENTENCEPIECE_MODEL)
        elif file.name == SENTENCEPIECE_MODEL:
            _write_other_model(file, vocabulary, learned, folder / SENTENCEPIECE_MODEL)
        elif file.name in _OLD_VOCABULARY:
            logger.warning("%s holds the old vocabulary and is left out", file)
        else:
            shutil.copyfile(file, folder / file.name)


def _write_json(file: Path, vocabulary: Vocabulary, learned: Learned, target: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    # The library gives added tokens that the model lacks the ids after the model's size, whatever the file says; the
    # model grows, so they would move. In the model's own vocabulary they keep their ids, and no merge leads to them.
    model["vocab"].update({text: token_id for token_id, text in vocabulary.added.items() if text not in model["vocab"]})
    model["vocab"].update({piece: vocabulary.size + number for number, piece in enumerate(learned.pieces)})
    merges = learned.merges if vocabulary.is_byte_level else _merges_of_new(vocabulary, learned)
    is_of_lines = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] += [" ".join(pair) if is_of_lines else list(pair) for pair in merges]
    target.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _merges_of_new(vocabulary: Vocabulary, learned: Learned) -> list[tuple[str, str]]:
    """What SentencePiece would do with the same pieces."""
    fixed = vocabulary.added.keys() | vocabulary.bytes_of.keys()
    known = {piece for token_id, piece in enumerate(vocabulary.pieces) if piece and token_id not in fixed}
    return merges_of(learned.pieces, known | set(learned.pieces))


def _write_model(proto: ModelProto, learned: Learned, target: Path) -> None:
    lowest = min(piece.score for piece in proto.pieces if piece.type == Piece.NORMAL)
    for number, piece in enumerate(learned.pieces):
        proto.pieces.add(piece=piece, score=lowest - 1 - number, type=Piece.NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    target.write_bytes(proto.SerializeToString(deterministic=True))


def _write_other_model(file: Path, vocabulary: Vocabulary, learned: Learned, target: Path) -> None:
    """The SentencePiece model beside a tokenizer.json, if it has the same pieces."""
    try:
        proto = read_proto(file)
    except Fault as fault:
        logger.warning("%s is left out: %s", file, fault)
        return
    if [piece.piece for piece in proto.pieces] == vocabulary.pieces:
        _write_model(proto, learned, target)
    else:
        logger.warning("%s has other entries than %s beside it and is left out", file, TOKENIZER_JSON)


def _leave_out_other_model(folder: Path, texts: list[str]) -> None:
    """Remove the SentencePiece model beside a tokenizer.json if it gives other ids."""
    other = folder / SENTENCEPIECE_MODEL
    if not other.is_file() or not (folder / TOKENIZER_JSON).is_file():
        return
    first, second = Tokenizer.open(folder), Tokenizer.open(other)
    if any(not np.array_equal(first.encode(text), second.encode(text)) for text in texts):
        logger.warning("%s would give other ids than %s and is left out", SENTENCEPIECE_MODEL, TOKENIZER_JSON)
        other.unlink()
