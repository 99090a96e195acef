"""The vocabulary behind a tokenizer: what stands for each id, and how a text of such letters is cut into them.

Two kinds of BPE are known here, both of which can spell any text:

    byte-level           a piece is written in 256 letters, one a byte (GPT-2, GPT-NeoX, Llama 3, Qwen)
    with byte fallback   a piece is written in characters, a space as U+2581; what has no piece is spelled in tokens
                         such as <0xE3> (SentencePiece: Llama 2, Mistral)
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models

from cpt.config import Fault
from cpt.data.prepare.fast_bpe import byte_alphabet
from cpt.data.prepare.tokenizers import TOKENIZER_JSON, Tokenizer

ModelProto = sentencepiece_model_pb2.ModelProto
Piece = ModelProto.SentencePiece
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(0x100)}
_KINDS = "BPE over bytes and BPE with byte fallback can be extended"


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id, None where an id has none.

    added: the text of tokens that stand for themselves, by id; no piece is merged into or out of them.
    bytes_of: the byte of each id that text falls back on.
    model: cuts a text, written in the letters of the pieces, into old pieces.
    """

    pieces: list[str | None]
    added: dict[int, str]
    bytes_of: dict[int, int]
    is_byte_level: bool
    model: models.BPE

    @staticmethod
    def of(tokenizer: Tokenizer) -> Vocabulary:
        """The vocabulary of an opened tokenizer; Fault if it is none of the kinds that we know."""
        path = tokenizer.deciding_file
        return _of_json(path) if tokenizer.usual_name == TOKENIZER_JSON else _of_proto(read_proto(path), path)

    @property
    def size(self) -> int:
        """The largest id plus one."""
        return len(self.pieces)

    def cut(self, token_id: int, by: Vocabulary) -> list[int]:
        """The ids that `by`, another vocabulary of the same kind, spells the piece of `token_id` with."""
        text = self.added.get(token_id, self.pieces[token_id])
        if text is None:
            return []
        if token_id in self.added:
            text = self.written(text)
        return [token.id for token in by.model.tokenize(text)]

    def written(self, text: str) -> str:
        """A text in the letters of the pieces."""
        if not self.is_byte_level:
            return text.replace(" ", "\u2581")
        letters = {byte: letter for letter, byte in byte_alphabet().items()}
        return "".join(letters[byte] for byte in text.encode())

    def difference_from(self, older: Vocabulary) -> str | None:
        """The first id of `older` that means something else here, in words; None if all mean the same."""
        if older.is_byte_level != self.is_byte_level:
            return "one writes its pieces in bytes, the other in characters"
        for token_id, piece in enumerate(older.pieces):
            here = self.pieces[token_id] if token_id < self.size else None
            if piece is not None and here != piece:
                return f"id {token_id} is {piece!r} in one and {here!r} in the other"
        return None


def merges_of(pieces: Iterable[str], known: Container[str]) -> list[tuple[str, str]]:
    """The merge rules with which BPE does what SentencePiece does with `pieces`, the first learned first.

    SentencePiece merges the adjacent pair whose union has the best score, so every way to split a piece into two
    `known` ones becomes a rule with that rank.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def read_proto(path: Path) -> ModelProto:
    """A SentencePiece model; Fault if it is not BPE with byte fallback."""
    proto = ModelProto()
    proto.ParseFromString(path.read_bytes())
    spec = proto.trainer_spec
    if spec.model_type != spec.BPE:
        kind = spec.ModelType.Name(spec.model_type).capitalize()
        raise Fault(f"{path} is a {kind} model; only {_KINDS}")
    if not any(piece.type == Piece.BYTE for piece in proto.pieces):
        raise Fault(f"{path} has no byte fallback; only {_KINDS}")
    return proto


def _of_proto(proto: ModelProto, path: Path) -> Vocabulary:
    beyond = [token_id for token_id in _ids_of_companions(path.parent) if token_id >= len(proto.pieces)]
    if beyond:
        raise Fault(
            f"{path.parent}: token {min(beyond)} is added outside {path.name}, which has {len(proto.pieces):,} pieces; "
            f"make a {TOKENIZER_JSON} of both with transformers.AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER), and extend that"
        )
    pieces = [piece.piece for piece in proto.pieces]
    normal = sorted((piece for piece in proto.pieces if piece.type == Piece.NORMAL), key=lambda piece: -piece.score)
    learned = [piece.piece for piece in normal]
    # Byte pieces and those for special use are in the vocabulary, but nothing merges into them.
    model = models.BPE(
        {piece: token_id for token_id, piece in enumerate(pieces)},
        merges_of(learned, set(learned)),
        unk_token=pieces[proto.trainer_spec.unk_id],
        byte_fallback=True,
    )
    added = {i: p.piece for i, p in enumerate(proto.pieces) if p.type not in (Piece.NORMAL, Piece.BYTE)}
    bytes_of = {i: BYTE_PIECES[p.piece] for i, p in enumerate(proto.pieces) if p.type == Piece.BYTE}
    return Vocabulary(pieces, added, bytes_of, False, model)


def _ids_of_companions(folder: Path) -> list[int]:
    """Ids of added tokens that files beside a SentencePiece model tell of."""
    ids: list[int] = []
    for name, read in (
        ("added_tokens.json", lambda content: content.values()),
        ("tokenizer_config.json", lambda content: content.get("added_tokens_decoder", {})),
    ):
        if (folder / name).is_file():
            ids.extend(int(token_id) for token_id in read(json.loads((folder / name).read_text(encoding="utf-8"))))
    return ids


def _of_json(path: Path) -> Vocabulary:
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    is_byte_level = _holds_byte_level(content.get("pre_tokenizer"))
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise Fault(f"{path} is a {model.get('type', 'nameless')} model; only {_KINDS}")
    if not is_byte_level and not model.get("byte_fallback"):
        raise Fault(f"{path} is BPE neither over bytes nor with byte fallback; only {_KINDS}")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Fault(f"{path} drops merges or marks the parts of words; only plain {_KINDS}")
    reference = tokenizers.Tokenizer.from_file(str(path))
    ids = reference.get_vocab(with_added_tokens=True)
    pieces: list[str | None] = [None] * (max(ids.values()) + 1)
    for piece, token_id in ids.items():
        pieces[token_id] = piece
    added = {token_id: token.content for token_id, token in reference.get_added_tokens_decoder().items()}
    bytes_of = {} if is_byte_level else {ids[name]: byte for name, byte in BYTE_PIECES.items() if name in ids}
    return Vocabulary(pieces, added, bytes_of, is_byte_level, reference.model)


def _holds_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    inner = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return any(part["type"] == "ByteLevel" for part in inner)
