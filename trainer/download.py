"""Files from the network that are whole or not there."""

from __future__ import annotations

import http.client
import urllib.request
from pathlib import Path

from tqdm import tqdm

from trainer.errors import UserError
from trainer.files import atomic_write, remove_partial_files

CHUNK = 1 << 20  # bytes
SILENCE = 60  # seconds without a byte after which a download has failed


def fetch(url: str, path: Path, size: str) -> Path:
    """The file `path`, downloaded unless it is there. Raises UserError, saying what to put where, if it cannot be.

    size: about how much, in words, for that message.
    """
    if path.exists():
        return path
    remove_partial_files(path)
    try:
        with urllib.request.urlopen(url, timeout=SILENCE) as response, atomic_write(path) as f:
            length = response.length
            with tqdm(total=length, desc=f"downloading {path.name}", unit="B", unit_scale=True, mininterval=1) as bar:
                while chunk := response.read(CHUNK):
                    f.write(chunk)
                    bar.update(len(chunk))
            if length not in (None, f.tell()):
                raise OSError(f"{f.tell()} of {length} bytes came")
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", None) or e
        raise UserError(
            f"cannot download {url} ({reason}): download it ({size}) elsewhere and put it at {path}"
        ) from None
    return path
