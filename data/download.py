"""Download files. A file at its final path is always complete."""

from __future__ import annotations

import http.client
import urllib.request
from pathlib import Path

from tqdm import tqdm

from trainer.errors import UserError
from trainer.files import atomic_write, remove_partial_files

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without data


def fetch(url: str, path: Path, size: str) -> Path:
    """Download `url` to `path`, unless `path` exists. Returns `path`.

    size: approximate size in words, for the error message. Raises UserError if the download fails.
    """
    if path.exists():
        return path
    remove_partial_files(path)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, atomic_write(path) as f:
            length = response.length
            with tqdm(total=length, desc=f"downloading {path.name}", unit="B", unit_scale=True, mininterval=1) as bar:
                while chunk := response.read(CHUNK):
                    f.write(chunk)
                    bar.update(len(chunk))
            if length not in (None, f.tell()):
                raise OSError(f"{f.tell()} of {length} bytes were received")
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", None) or e
        raise UserError(
            f"cannot download {url} ({reason}): download it ({size}) elsewhere and put it at {path}"
        ) from None
    return path
