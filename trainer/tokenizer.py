"""Tokenizers by the name that a dataset's meta.json gives, or by the characters that its meta file lists."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import tiktoken

from trainer.errors import UserError

BYTE_TOKENIZER = "bytes"
GPT2_TOKENIZER = "gpt2"
TOKENIZERS = (BYTE_TOKENIZER, GPT2_TOKENIZER)
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # for an id that stands for no text


class Codec(Protocol):
    """Text as token ids and back."""

    size: int  # ids are below it
    start: list[int]  # what an empty prompt begins with

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]: ...


class TiktokenCodec:
    """A tiktoken encoding, which has <|endoftext|>."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.size = encoding.n_vocab
        self.start = [encoding.eot_token]

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of each id as it comes. A character waits for its last byte, and is left out if that never comes."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            try:
                piece = self.encoding.decode_single_token_bytes(i)
            except KeyError:  # a model's vocabulary may be padded
                piece = UNKNOWN.encode()
            yield decoder.decode(piece)


class CharacterCodec:
    """One token a character.

    Raises ValueError if the mappings are empty, or hold something else than characters and ids.
    """

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

    def encode(self, text: str) -> list[int]:
        """Raises UserError for a character that the vocabulary lacks."""
        for c in text:
            if c not in self.to_id:
                raise UserError(f"the model knows {len(self.to_id)} characters, and {c!r} is none of them")
        return [self.to_id[c] for c in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        return (self.to_character.get(i, UNKNOWN) for i in ids)


def codec_for(meta: dict[str, Any], where: str) -> Codec:
    """The codec that a dataset's meta file (trainer.data.read_meta) describes; GPT-2's if there is none.

    where: what messages call the file. Raises UserError if it names no tokenizer, or GPT-2's cannot be loaded.
    """
    if not meta:
        return TiktokenCodec(encoding_for(GPT2_TOKENIZER))
    try:
        if "characters" in meta:
            characters = dict(enumerate(meta["characters"]))
            return CharacterCodec({c: i for i, c in characters.items()}, characters)
        if "stoi" in meta and "itos" in meta:
            return CharacterCodec(dict(meta["stoi"]), dict(meta["itos"]))
        name = meta.get("tokenizer")
        if name not in TOKENIZERS:
            raise ValueError(f"its tokenizer is {name!r}, and not {' or '.join(map(repr, TOKENIZERS))}")
        return TiktokenCodec(encoding_for(name))
    except (TypeError, ValueError) as e:
        raise UserError(f"{where} describes no vocabulary: {e}") from None


def encoding_for(name: str) -> tiktoken.Encoding:
    """The encoding 'bytes' or 'gpt2'. Raises UserError for another, or if GPT-2's cannot be loaded."""
    if name not in TOKENIZERS:
        raise UserError(f"there is no tokenizer {name!r}: it is {' or '.join(map(repr, TOKENIZERS))}")
    if name == BYTE_TOKENIZER:
        return byte_encoding()
    try:
        return tiktoken.get_encoding(GPT2_TOKENIZER)
    except Exception as e:  # requests' errors, and tiktoken's own for a damaged file
        raise UserError(
            f"GPT-2's tokenizer cannot be loaded ({type(e).__name__}): run this once with a network, or set "
            "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's files from a machine with one"
        ) from None


def byte_encoding() -> tiktoken.Encoding:
    """One token a byte, ids 0 to 255, and <|endoftext|> as 256. Needs no download."""
    return tiktoken.Encoding(
        name=BYTE_TOKENIZER,
        # without merges the pattern has no effect on the tokens; short pieces keep the merge search short
        pat_str=r"\S+|\s+",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={END_OF_TEXT: 256},
    )
