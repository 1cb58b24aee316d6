"""Tokenizers: bytes, GPT-2's, and single characters. A dataset's meta file names its tokenizer."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import tiktoken

from trainer.errors import UserError

BYTE_TOKENIZER = "bytes"
GPT2_TOKENIZER = "gpt2"
CHARACTER_TOKENIZER = "characters"
TOKENIZERS = (BYTE_TOKENIZER, GPT2_TOKENIZER)  # of encoding_for
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # text of an id outside the vocabulary


class Codec(Protocol):
    """Converts text to token ids and back."""

    name: str  # in meta.json
    size: int  # ids are below it
    end_of_text: int | None  # id of <|endoftext|>
    start: list[int]  # ids to sample from if the prompt is empty

    def encode(self, text: str) -> list[int]:
        """Encode a prompt, in which <|endoftext|> is the token."""

    def encode_plain(self, text: str) -> np.ndarray:
        """Encode a document, in which <|endoftext|> is ordinary text. Returns [tokens], integers."""

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode one id at a time. A character is yielded with its last byte, or not at all if that is missing."""

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.decode_stream(ids))


class TiktokenCodec(Codec):
    """A tiktoken encoding that has <|endoftext|>."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.name = encoding.name
        self.size = encoding.n_vocab
        self.end_of_text = encoding.eot_token
        self.start = [encoding.eot_token]

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def encode_plain(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            try:
                piece = self.encoding.decode_single_token_bytes(i)
            except KeyError:  # a model's vocabulary may be padded
                piece = UNKNOWN.encode()
            yield decoder.decode(piece)


class CharacterCodec(Codec):
    """One token per character.

    Raises ValueError if the vocabulary is empty, or does not consist of strings and non-negative integers.
    """

    name = CHARACTER_TOKENIZER
    end_of_text = None

    def __init__(self, to_id: dict[str, int], to_character: dict[int, str]):
        for characters, ids in ((to_id.keys(), to_id.values()), (to_character.values(), to_character.keys())):
            if not all(isinstance(c, str) for c in characters) or not all(isinstance(i, int) and i >= 0 for i in ids):
                raise ValueError("a vocabulary maps characters to ids")
        if not to_id:
            raise ValueError("the vocabulary is empty")
        self.to_id = to_id
        self.to_character = to_character
        self.size = max(to_id.values()) + 1
        self.start = [to_id.get("\n", 0)]

    @classmethod
    def from_list(cls, characters: list[str]) -> CharacterCodec:
        """The codec whose id i is the i-th character."""
        return cls({c: i for i, c in enumerate(characters)}, dict(enumerate(characters)))

    def encode(self, text: str) -> list[int]:
        """Raises UserError for a character outside the vocabulary."""
        try:
            return [self.to_id[c] for c in text]
        except KeyError as e:
            raise UserError(f"the character {e} is not in the model's vocabulary of {len(self.to_id)}") from None

    def encode_plain(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=np.int64)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        return (self.to_character.get(i, UNKNOWN) for i in ids)


def codec_for(meta: dict[str, Any], where: str) -> Codec:
    """The codec that a dataset's meta file (trainer.data.read_meta) describes. Without a meta file: GPT-2's.

    where: name of the meta file in error messages. Raises UserError if it describes no vocabulary, or if GPT-2's
    tokenizer cannot be loaded.
    """
    if not meta:
        return TiktokenCodec(encoding_for(GPT2_TOKENIZER))
    try:
        if "characters" in meta:
            return CharacterCodec.from_list(meta["characters"])
        if "stoi" in meta and "itos" in meta:
            return CharacterCodec(dict(meta["stoi"]), dict(meta["itos"]))
        name = meta.get("tokenizer")
        if name not in TOKENIZERS:
            raise ValueError(f"its tokenizer is {name!r}, and not {' or '.join(map(repr, TOKENIZERS))}")
    except (TypeError, ValueError) as e:
        raise UserError(f"{where} describes no vocabulary: {e}") from None
    return TiktokenCodec(encoding_for(name))


def encoding_for(name: str) -> tiktoken.Encoding:
    """The encoding 'bytes' or 'gpt2'. Raises UserError for another name, or if GPT-2's cannot be loaded."""
    if name not in TOKENIZERS:
        raise UserError(f"there is no tokenizer {name!r}; use {' or '.join(map(repr, TOKENIZERS))}")
    if name == BYTE_TOKENIZER:
        return byte_encoding()
    try:
        return tiktoken.get_encoding(GPT2_TOKENIZER)
    except Exception as e:  # errors of requests, or of tiktoken for a damaged file
        raise UserError(
            f"GPT-2's tokenizer cannot be loaded ({type(e).__name__}): run this once with a network connection, or set "
            "TIKTOKEN_CACHE_DIR to a folder with tiktoken's files from another machine"
        ) from None


def byte_encoding() -> tiktoken.Encoding:
    """One token per byte, with ids 0 to 255, and <|endoftext|> as 256. Needs no download."""
    return tiktoken.Encoding(
        name=BYTE_TOKENIZER,
        # there are no merges, so the pattern does not change the tokens; short matches are faster to encode
        pat_str=r"\S+|\s+",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={END_OF_TEXT: 256},
    )
