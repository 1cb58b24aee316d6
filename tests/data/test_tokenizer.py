"""Text comes back from its token ids."""

import numpy as np
import pytest

from data.tokenizer import END_OF_TEXT, UNKNOWN, TiktokenCodec, byte_encoding, codec_for
from trainer.errors import UserError

TEXT = "hétérogène 漢字 \U0001f600\n"
IN_ORDER = codec_for({"characters": sorted(set(TEXT))}, "")
TO_ID = {c: 3 * i + 1 for i, c in enumerate(reversed(sorted(set(TEXT))))}  # nanoGPT's mapping may have any ids
SPARSE = codec_for({"stoi": TO_ID, "itos": {i: c for c, i in TO_ID.items()}}, "")
BYTES = TiktokenCodec(byte_encoding())


@pytest.mark.parametrize(
    "codec, ids, start",
    [
        (IN_ORDER, [sorted(set(TEXT)).index(c) for c in TEXT], [0]),
        (SPARSE, [TO_ID[c] for c in TEXT], [TO_ID["\n"]]),
        (BYTES, [*TEXT.encode()], [256]),
    ],
    ids=["characters", "stoi", "bytes"],
)
def test_a_codec_maps_text_to_its_ids_and_back(codec, ids, start):
    assert codec.encode(TEXT) == ids
    assert codec.encode_plain(TEXT).tolist() == ids and np.issubdtype(codec.encode_plain(TEXT).dtype, np.integer)
    assert codec.decode(ids) == "".join(codec.decode_stream(ids)) == TEXT
    assert codec.size == (257 if codec is BYTES else max(ids) + 1) and codec.start == start
    assert codec.decode([ids[0], 300]) == "h" + UNKNOWN  # a model's vocabulary may be padded


def test_end_of_text_is_a_token_in_prompts_and_text_in_documents():
    assert BYTES.encode(f"a{END_OF_TEXT}") == [97, 256]
    assert BYTES.encode_plain(f"a{END_OF_TEXT}").tolist() == [*f"a{END_OF_TEXT}".encode()]
    assert BYTES.end_of_text == 256 and SPARSE.end_of_text is None


def test_a_character_is_decoded_with_its_last_byte_or_not_at_all():
    assert [*BYTES.decode_stream("é漢".encode()[:-1])] == ["", "é", "", ""]
    assert BYTES.decode([0xE6, 0xBC, ord("a")]) == UNKNOWN + "a"


def test_a_character_outside_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=f"'x' is not .* {len(set(TEXT))}$"):
        SPARSE.encode("héx")
