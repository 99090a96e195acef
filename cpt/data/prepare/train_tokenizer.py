"""Training a tokenizer from text: SentencePiece BPE with byte fallback, or byte-level BPE. Both lose nothing.

SentencePiece writes a space as U+2581 and so would turn a U+2581 in the text into a space. Here that character is
escaped before and unescaped after, by a pair that no text can confuse (`ESCAPES`). The model also learns what code is
made of: runs of spaces and tabs, and line ends together with the punctuation before them.

A folder gets `tokenizer.json` too, the same tokenizer for the tokenizers library and transformers: SentencePiece merges
the adjacent pair whose union has the best score, so every way to split a piece becomes a merge rule with that rank.
"""

from __future__ import annotations

import heapq
import json
import logging
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cpt.config import Fault
from cpt.data.prepare.aside import written_aside
from cpt.data.prepare.documents import read_documents
from cpt.data.prepare.pieces import merges_of
from cpt.data.prepare.tokenizers import CONFIG_NAME, SENTENCEPIECE_MODEL, TOKENIZER_JSON

logger = logging.getLogger(__name__)

SPACE_SIGN = "\u2581"
# A character for private use that no text should hold; if one does, it is escaped as well. The second sign keeps the
# two apart, so that replacing one after the other undoes them in any text.
ESCAPE = "\U0010fffd"
ESCAPES = {ESCAPE: ESCAPE + "0", SPACE_SIGN: ESCAPE + "1"}
# The trainer keeps the tab for itself and drops documents with U+2585; it sees these signs instead, of the same script.
TAB_STAND_IN = "\u2409"
TRAINER_SIGNS = str.maketrans({"\t": TAB_STAND_IN, "\u2585": "\u2586"})
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
END_OF_TEXT = "<|endoftext|>"
DEFAULT_KIND = "sentencepiece"


@dataclass(frozen=True)
class TokenizerReport:
    """What was trained, on how much of the text; sizes in UTF-8 bytes."""

    path: Path
    kind: str
    vocabulary_size: int
    num_documents: int
    num_bytes: int
    sampled_documents: int
    sampled_bytes: int


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocabulary_size: int,
    kind: str = DEFAULT_KIND,
    *,
    sample_bytes: int = 100_000_000,
    seed: int = 0,
    text_key: str = "text",
    on_error: str = "stop",
) -> TokenizerReport:
    """Trains a tokenizer and writes its folder, which appears whole or not at all. The same input gives the same bytes.

    kind: "sentencepiece" (ids: <unk> 0, <s> 1, </s> 2, no padding) or "byte-bpe" (<|endoftext|> 0).
    sample_bytes: longest text to learn from; of more, a fair sample of documents drawn with `seed`.

    Raises Fault if the output is in use, the text too short or the vocabulary too small for that size of vocabulary.
    """
    if kind not in TRAINERS:
        raise Fault(f"kind = {kind!r}; known: {', '.join(TRAINERS)}")
    with written_aside(output) as folder:
        sample = sample_of(inputs, sample_bytes, seed, text_key, on_error)
        texts = sample.texts()
        logger.info("learning %s entries from %s bytes of text", f"{vocabulary_size:,}", f"{sample.sampled_bytes:,}")
        TRAINERS[kind](texts, folder, vocabulary_size)
    return TokenizerReport(
        Path(output), kind, vocabulary_size, sample.num_documents, sample.num_bytes, len(texts), sample.sampled_bytes
    )


class Sample:
    """A fair sample of documents whose text is not longer than `budget_bytes`, in the order of the input.

    Every document draws a number; those with the smallest stay. Memory: the budget and one document.
    """

    def __init__(self, budget_bytes: int, seed: int) -> None:
        self._budget_bytes = budget_bytes
        self._random = random.Random(seed)
        self._largest_first: list[tuple[float, int, str, int]] = []
        self.num_documents = self.num_bytes = self.sampled_bytes = 0

    def add(self, text: str) -> None:
        """One more document; all are added before `texts` is asked for."""
        encoded = text.encode()
        self.num_bytes += len(encoded)
        if len(encoded) > self._budget_bytes:
            text = encoded[: self._budget_bytes].decode(errors="ignore")
        size = min(len(encoded), self._budget_bytes)
        heapq.heappush(self._largest_first, (-self._random.random(), self.num_documents, text, size))
        self.num_documents += 1
        self.sampled_bytes += size
        while self.sampled_bytes > self._budget_bytes:
            self.sampled_bytes -= heapq.heappop(self._largest_first)[3]

    def texts(self) -> list[str]:
        """The documents of the sample."""
        return [text for _, _, text, _ in sorted(self._largest_first, key=lambda entry: entry[1])]


def sample_of(inputs: Sequence[str | Path], budget_bytes: int, seed: int, text_key: str, on_error: str) -> Sample:
    """A sample of the documents of these files; Fault if none of them has text."""
    sample = Sample(budget_bytes, seed)
    for document in read_documents(inputs, text_key, on_error):
        sample.add(document.text)
    if not sample.num_documents:
        raise Fault(f"no document with text in {', '.join(map(str, inputs))}; a tokenizer is learned from text")
    return sample


def _train_sentencepiece(texts: list[str], folder: Path, vocabulary_size: int) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(_sentencepiece_model(texts, vocabulary_size))
    # The paths of the rule files differ from run to run, the model must not.
    proto.normalizer_spec.normalization_rule_tsv = proto.denormalizer_spec.normalization_rule_tsv = ""
    for piece in proto.pieces:
        piece.piece = piece.piece.replace(TAB_STAND_IN, "\t")
    (folder / SENTENCEPIECE_MODEL).write_bytes(proto.SerializeToString(deterministic=True))
    _converted(proto).save(str(folder / TOKENIZER_JSON))
    _write_config(folder, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END)


def _sentencepiece_model(texts: list[str], vocabulary_size: int) -> bytes:
    model = BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        escape_rules, unescape_rules = Path(folder) / "escape.tsv", Path(folder) / "unescape.tsv"
        escape_rules.write_text("".join(f"{_hexadecimal(k)}\t{_hexadecimal(v)}\n" for k, v in ESCAPES.items()))
        unescape_rules.write_text("".join(f"{_hexadecimal(v)}\t{_hexadecimal(k)}\n" for k, v in ESCAPES.items()))
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(text.translate(TRAINER_SIGNS) for text in texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocabulary_size,
                byte_fallback=True,
                normalization_rule_tsv=str(escape_rules),
                denormalization_rule_tsv=str(unescape_rules),
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                # Whole documents, or line ends would be lost; what is longer is skipped.
                max_sentence_length=max(4 * len(text) for text in texts),
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                # Results do not depend on it, but it is written into the model.
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise Fault(_unmeetable(str(error), vocabulary_size)) from error
    return model.getvalue()


def _hexadecimal(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)


def _unmeetable(message: str, vocabulary_size: int) -> str:
    """SentencePiece's words about a size of vocabulary, in ours."""
    if found := re.search(r"set it to a value <= (\d+)", message):
        return _too_large(vocabulary_size, int(found[1]))
    if found := re.search(r"smaller than required_chars\S* \d+ vs (\d+)", message):
        return _too_small(vocabulary_size, int(found[1]))
    return f"SentencePiece cannot train on this text with a vocabulary of {vocabulary_size:,}: {message}"


def _too_large(vocabulary_size: int, largest: int) -> str:
    return (
        f"a vocabulary of {vocabulary_size:,} is too large for this text, which yields {largest:,} entries at most; "
        f"use --vocab-size {largest} or less, or more text"
    )


def _too_small(vocabulary_size: int, smallest: int) -> str:
    return (
        f"a vocabulary of {vocabulary_size:,} is too small for the bytes and characters of this text; "
        f"use --vocab-size {smallest} or more"
    )


def _converted(proto: sentencepiece_model_pb2.ModelProto) -> tokenizers.Tokenizer:
    """The same tokenizer for the tokenizers library: the same ids for every text."""
    pieces = [piece.piece for piece in proto.pieces]
    learned = {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}
    # Pieces are stored by falling score, which is the order in which they were learned.
    merges = merges_of([piece for piece in pieces if piece in learned], learned)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=UNKNOWN, byte_fallback=True))
    escape = [normalizers.Replace(sign, escaped) for sign, escaped in ESCAPES.items()]
    tokenizer.normalizer = normalizers.Sequence([*escape, normalizers.Replace(" ", SPACE_SIGN)])
    unescape = [decoders.Replace(escaped, sign) for sign, escaped in reversed(ESCAPES.items())]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_SIGN, " "), decoders.ByteFallback(), decoders.Fuse(), *unescape]
    )
    tokenizer.add_special_tokens([UNKNOWN, BEGIN, END])
    return tokenizer


def _train_byte_bpe(texts: list[str], folder: Path, vocabulary_size: int) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary_size < len(alphabet) + 1:
        raise Fault(_too_small(vocabulary_size, len(alphabet) + 1))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocabulary_size:
        raise Fault(_too_large(vocabulary_size, tokenizer.get_vocab_size()))
    tokenizer.save(str(folder / TOKENIZER_JSON))
    _write_config(folder, unk_token=END_OF_TEXT, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _write_config(folder: Path, **special_tokens: str) -> None:
    """What transformers needs to know besides tokenizer.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        # The text "</s>" stays text: a document cannot end in its middle because it speaks of one.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


TRAINERS = {"sentencepiece": _train_sentencepiece, "byte-bpe": _train_byte_bpe}
