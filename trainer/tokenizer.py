"""Tokenizers by the name that a dataset's meta.json gives."""

from __future__ import annotations

import tiktoken

BYTE_TOKENIZER = "bytes"
END_OF_TEXT = "<|endoftext|>"


def byte_encoding() -> tiktoken.Encoding:
    """One token a byte, ids 0 to 255, and <|endoftext|> as 256. Needs no download."""
    return tiktoken.Encoding(
        name=BYTE_TOKENIZER,
        # without merges the pattern has no effect on the tokens; short pieces keep the merge search short
        pat_str=r"\S+|\s+",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={END_OF_TEXT: 256},
    )
