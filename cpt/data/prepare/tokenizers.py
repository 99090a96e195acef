"""Tokenizers as a corpus uses them: text to ids and back, the end of a document, and the files to keep beside.

Two kinds stand behind one face: `tokenizer.json` through the tokenizers library or a faster engine with the same ids,
`tokenizer.model` through SentencePiece. Where a folder has both, the first decides, as it does for transformers.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
import xxhash

from cpt.config import Fault
from cpt.data.prepare import long_texts
from cpt.data.prepare.checked_encoder import CheckedEncoder
from cpt.data.prepare.fast_bpe import byte_alphabet, refuse

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
CONFIG_NAME = "tokenizer_config.json"
# What a tokenizer folder may hold besides the file that decides the ids.
COMPANIONS = (
    CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Where no file names them, the usual spellings, the most particular first.
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
USUAL_BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>")
ENGINES = ("auto", "huggingface")
USUAL_PADDINGS = ("<|padding|>", "<|pad|>", "<pad>")


class Tokenizer(ABC):
    """Text to token ids and back; make it with `Tokenizer.open`.

    vocabulary_size: the largest id plus one.
    end_of_document, begin_of_document, unknown, padding: token ids, None where the tokenizer has none.
    files: what `copy_to` copies.
    """

    vocabulary_size: int
    end_of_document: int | None
    begin_of_document: int | None
    unknown: int | None
    padding: int | None

    def __init__(self, deciding_file: Path, files: list[Path]) -> None:
        self.deciding_file = deciding_file
        self.files = files

    @staticmethod
    def open(path: str | Path, engine: str = "auto") -> Tokenizer:
        """The tokenizer in a folder (a Hugging Face one, or ours), or a tokenizer.json or SentencePiece model file.

        engine: "huggingface" encodes with the package tokenizers, even where a faster one gives the same ids.

        Raises Fault if there is none or it cannot be read, or if the engine cannot serve it.
        """
        if engine not in ENGINES:
            raise Fault(f"engine = {engine!r}; known: {', '.join(ENGINES)}")
        tokenizer = Tokenizer._open(Path(path))
        if engine != "auto":
            tokenizer.use_slow_engine()
        return tokenizer

    @staticmethod
    def _open(path: Path) -> Tokenizer:
        if path.is_dir():
            names = [name for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL) if (path / name).is_file()]
            if not names:
                raise Fault(_nothing_there(path))
            companions = [path / name for name in (*names, *COMPANIONS) if (path / name).is_file()]
            return _engine(path / names[0], companions)
        if not path.exists():
            raise Fault(f"there is no tokenizer at {path}; cpt data tokenizer trains one")
        companions = []
        # Beside a file of another name, a configuration may belong to another tokenizer.
        if path.name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL):
            companions = [path.parent / name for name in COMPANIONS if (path.parent / name).is_file()]
        return _engine(path, [path, *companions])

    def encode(self, text: str) -> np.ndarray:
        """Token ids of the text, int32 [tokens]; nothing is put before or after."""
        if len(text) <= long_texts.LONGEST_AT_ONCE:
            return self._encode(text)
        return np.concatenate([self._encode(part) for part in long_texts.parts_of(text, self._encode)])

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """The ids of a text that fits into the memory as the engine needs it."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of these ids."""

    @property
    @abstractmethod
    def engine(self) -> str:
        """The package that encodes, and why it does, in words."""

    @abstractmethod
    def use_slow_engine(self) -> None:
        """Encodes with the package tokenizers from here on; Fault where it cannot."""

    @abstractmethod
    def begin_input(self) -> None:
        """The texts to come are of another input; an engine that is checked on samples is checked anew."""

    @property
    def byte_tokens(self) -> np.ndarray:
        """Ids of the tokens for one byte that text falls back on, int32, sorted.

        Pieces such as <0xE3>, where there are any; of byte-level BPE the bytes that are no character by themselves.
        """
        pieces = self._pieces()
        names = {f"<0x{byte:02X}>" for byte in range(0x100)} & pieces.keys()
        if not names and self._is_byte_level:
            names = {letter for letter, byte in byte_alphabet().items() if byte >= 0x80} & pieces.keys()
        return np.array(sorted(pieces[name] for name in names), dtype=np.int32)

    @property
    def _is_byte_level(self) -> bool:
        return False

    @abstractmethod
    def _pieces(self) -> dict[str, int]:
        """The vocabulary: the id of every piece."""

    @cached_property
    def hash(self) -> str:
        """xxh64, in hexadecimal, of the file that decides the ids."""
        return xxhash.xxh64(self.deciding_file.read_bytes()).hexdigest()

    def copy_to(self, folder: Path) -> None:
        """Copies the tokenizer's files byte for byte, under the names that a tokenizer folder has."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            shutil.copyfile(file, folder / (self.usual_name if file == self.deciding_file else file.name))

    @property
    @abstractmethod
    def usual_name(self) -> str:
        """What the deciding file is called in a tokenizer folder."""


class _JsonTokenizer(Tokenizer):
    usual_name = TOKENIZER_JSON

    def __init__(self, deciding_file: Path, files: list[Path]) -> None:
        super().__init__(deciding_file, files)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(deciding_file))
        # The library raises nothing narrower.
        except Exception as error:
            raise Fault(f"cannot read the tokenizer {deciding_file}: {error}") from error
        # Files saved by a training run may hold its truncation; it would cut documents short without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = self._settings()
        # True for our own tokenizers: "</s>" in a text is then five characters, not the end of the document.
        self._tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        self.vocabulary_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.end_of_document = self._find(settings.get("eos_token"), USUAL_ENDS)
        self.begin_of_document = self._find(settings.get("bos_token"), USUAL_BEGINNINGS)
        self.unknown = self._find(settings.get("unk_token"), ("<unk>",))
        self.padding = self._find(settings.get("pad_token"), USUAL_PADDINGS)

    def _settings(self) -> dict[str, Any]:
        """Special tokens as the folder's files name them; tokenizer_config.json has the last word."""
        settings: dict[str, Any] = {}
        named = {file.name: file for file in self.files}
        for name in ("special_tokens_map.json", CONFIG_NAME):
            if name in named:
                try:
                    content = json.loads(named[name].read_text(encoding="utf-8"))
                except ValueError as error:
                    raise Fault(f"{named[name]} is not JSON: {error}") from error
                settings.update({key: value for key, value in content.items() if value is not None})
        return settings

    def _find(self, named: str | dict[str, Any] | None, usual: tuple[str, ...]) -> int | None:
        if isinstance(named, dict):
            named = named.get("content")
        ids = (self._tokenizer.token_to_id(token) for token in ([named] if named else usual))
        return next((token_id for token_id in ids if token_id is not None), None)

    def _encode(self, text: str) -> np.ndarray:
        return self._encoder.encode(text)

    def begin_input(self) -> None:
        self._encoder.begin_input()

    @cached_property
    def _encoder(self) -> CheckedEncoder:
        # Only who encodes pays for it: a third of a second with a vocabulary of 50,000.
        return CheckedEncoder(self._tokenizer)

    def use_slow_engine(self) -> None:
        self._encoder = CheckedEncoder(self._tokenizer, refuse)

    @property
    def engine(self) -> str:
        return self._encoder.description

    @property
    def _is_byte_level(self) -> bool:
        return isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)

    def _pieces(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


class _SentencePieceTokenizer(Tokenizer):
    usual_name = SENTENCEPIECE_MODEL
    engine = "the package sentencepiece"

    def __init__(self, deciding_file: Path, files: list[Path]) -> None:
        super().__init__(deciding_file, files)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(deciding_file))
        except (OSError, RuntimeError) as error:
            raise Fault(f"cannot read the SentencePiece model {deciding_file}: {error}") from error
        self.vocabulary_size = self._model.get_piece_size()
        self.end_of_document = self._find(self._model.eos_id(), USUAL_ENDS)
        self.begin_of_document = self._find(self._model.bos_id(), USUAL_BEGINNINGS)
        self.unknown = self._model.unk_id()
        self.padding = self._find(self._model.pad_id(), USUAL_PADDINGS)

    def _find(self, named: int, usual: tuple[str, ...]) -> int | None:
        if named >= 0:
            return named
        ids = (self._model.piece_to_id(piece) for piece in usual)
        return next((token_id for token_id in ids if token_id != self._model.unk_id()), None)

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text), dtype=np.int32)

    def use_slow_engine(self) -> None:
        raise Fault(
            f"the engine huggingface reads no SentencePiece model, and {self.deciding_file} is one; "
            "leave --engine out, or name a tokenizer.json"
        )

    def begin_input(self) -> None:
        # There is one engine only, and nothing to hold it against.
        return

    def _pieces(self) -> dict[str, int]:
        ids = range(self.vocabulary_size)
        return dict(zip(self._model.id_to_piece(list(ids)), ids, strict=True))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(np.asarray(ids).tolist())


def _engine(deciding_file: Path, files: list[Path]) -> Tokenizer:
    kind = _JsonTokenizer if deciding_file.suffix == ".json" else _SentencePieceTokenizer
    return kind(deciding_file, files)


def _nothing_there(folder: Path) -> str:
    if (folder / "vocab.json").exists():
        return (
            f"{folder} has vocab.json but no {TOKENIZER_JSON}; make one with "
            f"transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return (
        f"{folder} has neither {TOKENIZER_JSON} nor {SENTENCEPIECE_MODEL}; "
        "name a folder or file that is a tokenizer, or train one with cpt data tokenizer"
    )
