"""ckpt.pt: everything a run needs to go on, readable without unpickling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.files import whole_file

NAME = "ckpt.pt"


def save(out_dir: Path, checkpoint: dict[str, Any]) -> None:
    """Write out_dir/ckpt.pt; an older one stays until the new one is whole. Raises UserError if it cannot."""
    try:
        with whole_file(out_dir / NAME) as f:
            torch.save(checkpoint, f)
    except OSError as e:
        raise UserError(f"cannot save {out_dir / NAME}: {e.strerror}; an older checkpoint is untouched") from None


def load(out_dir: Path, device: torch.device) -> dict[str, Any]:
    """The checkpoint in out_dir, tensors on `device`. Raises UserError if there is none or it is no checkpoint."""
    path = out_dir / NAME
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {path} to resume from; start the run with --init_from=scratch") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except Exception:  # damaged bytes raise nearly anything
        raise UserError(f"{path} is damaged or no checkpoint of this program") from None
    missing = {"model", "optimizer", "model_args", "iter_num"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise UserError(f"{path} is no training checkpoint: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's global generators, which dropout and router noise draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
