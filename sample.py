"""Text from a trained run, or from GPT-2.

python sample.py --out_dir=out/vertical_slice --prompt="def " --num_samples=2 --max_new_tokens=200
python sample.py --out_dir=out/vertical_slice --prompt="def " --beta=off
python sample.py --init_from=gpt2 --prompt=FILE:prompt.txt
python sample.py --help
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chronomoe.config import ChronoConfig
from chronomoe.options import option, options_of
from model import GPT, GPTConfig
from train import pick_device, pick_precision
from trainer import checkpoint as checkpoints
from trainer import settings as setting
from trainer.data import DATA, read_meta
from trainer.errors import UserError, run
from trainer.files import read_text
from trainer.settings import PREFIX
from trainer.tokenizer import GPT2_TOKENIZER, Codec, TiktokenCodec, codec_for, encoding_for
from trainer.weights import GPT2
from trainer.weights import find as find_weights

GPT2_TOKENS = 50257
FILE = "FILE:"
ALIASES = {"prompt": "start"}
SEPARATOR = "-" * 15
USAGE = "usage: python sample.py [FILE.py ...] [--key=value ...] [--help]"


@dataclass
class SampleSettings:
    """nanoGPT's keys, and this program's own."""

    init_from: str = option("resume", f"'resume': the run in out_dir; {', '.join(GPT2)}; or a PATH to a checkpoint")
    out_dir: str = option("out", "folder of the run")
    start: str = option("", "text to begin with, also --prompt; FILE:name reads a file; empty: a text's beginning")
    num_samples: int = option(10, "texts", least=1)
    max_new_tokens: int = option(500, "tokens a text, beside the prompt", least=1)
    temperature: float = option(0.8, "below 1 more predictable, above 1 less; 0: the likeliest token", least=0)
    top_k: int | None = option(200, "draw from so many likeliest tokens; None: from all", least=1)
    seed: int = option(1337, "the same seed gives the same texts", least=0)
    beta: str = option("on", "'off' samples with every expert's beta at 0", choices=("on", "off"))
    dataset: str = option("", "whose tokenizer to use: a folder under data/, or a path; empty: the run's own")
    device: str = option("auto", "'auto' (CUDA if there is one, else the CPU), 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = option(
        "auto",
        "'auto': bfloat16 or float16 on CUDA, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: bool = option(False, "torch.compile the model")


def main(arguments: list[str]) -> int:
    """Print texts as the arguments say. Returns the exit status: 0, 130 after Ctrl-C, 141 if the reader went away."""
    if "--help" in arguments or "-h" in arguments:
        print(setting.help_text(dict(options_of(SampleSettings)), USAGE))
        return 0
    s = SampleSettings(**given(arguments))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack the character
    try:
        sample(s)
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    return 0


def sample(s: SampleSettings) -> None:
    """Print num_samples texts, each token as it comes, with a line of dashes between texts; notes go to stderr."""
    prompt = read_prompt(s.start)
    device = pick_device(s.device)
    autocast = pick_precision(s, device)
    model, codec, notes = load(s)
    model.to(device).eval()
    ids = codec.encode(prompt)
    for note in [*notes, f"beta: {apply_beta(model, s.beta)}"]:
        print(note, file=sys.stderr)
    forward = model
    if s.compile:
        torch._dynamo.config.capture_scalar_outputs = True  # the loop over experts reads their token counts
        forward = torch.compile(model)
    idx = torch.tensor([ids or codec.start], device=device)
    generator = torch.Generator(device).manual_seed(s.seed)
    for i in range(s.num_samples):
        if i:
            print(SEPARATOR)
        # the prompt as the model sees it
        print(codec.decode(ids), end="", flush=True)
        with autocast():
            for text in codec.decode_stream(stream(forward, idx, s.max_new_tokens, s.temperature, s.top_k, generator)):
                print(text, end="", flush=True)
        print(flush=True)


@torch.no_grad()
def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Iterator[int]:
    """Ids that continue idx [1, T], of which the model sees the last block_size; GPT.generate's, one by one.

    Temperature 0 takes the likeliest. Raises UserError if a logit is not finite.
    """
    for _ in range(max_new_tokens):
        idx = idx[:, -model.config.block_size :]
        logits = model(idx)[0][:, -1, :]
        scaled = logits / temperature if temperature else logits
        if not scaled.isfinite().all():
            raise UserError(f"the model's logits, divided by temperature={temperature:g}, are not finite")
        if temperature == 0:
            next_id = scaled.argmax(-1, keepdim=True)
        else:
            if top_k is not None:
                least = scaled.topk(min(top_k, scaled.shape[-1])).values[:, -1:]
                scaled = scaled.masked_fill(scaled < least, -torch.inf)
            next_id = torch.multinomial(scaled.softmax(-1), 1, generator=generator)
        idx = torch.cat([idx, next_id], dim=1)
        yield next_id.item()


def apply_beta(model: GPT, beta: str) -> str:
    """Set beta to 0 if it is 'off'; in words, what routing uses."""
    coefficients = model.router_state.beta_coeff
    if not (model.config.chrono.router and coefficients.any()):
        return "none, the model has not learnt one"
    if beta == "on":
        return "on, as trained"
    coefficients.zero_()
    return "off, set to 0 in every expert"


def load(s: SampleSettings) -> tuple[GPT, Codec, list[str]]:
    """The model that init_from names, on the CPU, its tokenizer, and lines on where it comes from. Raises UserError."""
    if s.init_from in GPT2 or (Path(s.init_from) / "model.safetensors").is_file():
        codec = TiktokenCodec(encoding_for(GPT2_TOKENIZER))
        weights, model_args = find_weights(s.init_from)
        return build({"model": weights, "model_args": model_args}, Path(s.init_from)), codec, [f"model: {s.init_from}"]
    if s.init_from == "resume":
        path = Path(s.out_dir) / checkpoints.NAME
        saved, notes, _ = checkpoints.newest(Path(s.out_dir))
    else:
        path, notes = Path(s.init_from), []
        saved = load_file(path)
    model = build(saved, path)
    config = saved.get("config")
    dataset = s.dataset or (config.get("dataset") if isinstance(config, dict) else None)
    notes.append(f"model: {path.parent if s.init_from == 'resume' else path}, step {saved['iter_num']}")
    return model, find_codec(dataset, model.config.vocab_size), notes


def load_file(path: Path) -> dict[str, Any]:
    """The checkpoint in a file, or in a run's folder. Raises UserError if there is none."""
    try:
        return checkpoints.load(path / checkpoints.NAME if path.is_dir() else path)
    except FileNotFoundError:
        raise UserError(
            f"there is no checkpoint {path}: init_from is 'resume', {', '.join(map(repr, GPT2))}, or a path"
        ) from None
    except checkpoints.Damaged as e:
        raise UserError(f"{path} is damaged: {e}") from None


def build(saved: dict[str, Any], path: Path) -> GPT:
    """The model in a checkpoint of this program or of nanoMoE. Raises UserError if it does not fit its settings."""
    shape = {f.name for f in dataclasses.fields(GPTConfig)} - {"chrono"}
    steps = {PREFIX + f.name: f.name for f in dataclasses.fields(ChronoConfig)}
    try:
        chrono = ChronoConfig(**{steps[k]: v for k, v in saved.get("config", {}).items() if k in steps})
        model = GPT(GPTConfig(**{k: v for k, v in saved["model_args"].items() if k in shape}, chrono=chrono))
        # nanoMoE saves compiled models under a prefix, and knows no router_state
        weights = {name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()}
        model.load_state_dict(model.router_state.state_dict(prefix="router_state.") | weights)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{path} does not fit its own settings: {' '.join(str(e).split()[:40])}") from None
    return model


def find_codec(dataset: Any, vocab_size: int) -> Codec:
    """The tokenizer of a dataset, by its meta file. Raises UserError if it is not there, or is another model's."""
    hint = "--dataset=NAME or a path says whose tokenizer to use"
    if not isinstance(dataset, str):
        raise UserError(f"the checkpoint does not name its dataset: {hint}")
    folder = next((path for path in (DATA / dataset, Path(dataset)) if path.is_dir()), None)
    if folder is None:
        raise UserError(f"the dataset {dataset!r} is not there, neither {DATA / dataset} nor a path: {hint}")
    meta = read_meta(folder)
    if not meta and vocab_size < GPT2_TOKENS:
        raise UserError(f"{folder} has no meta.json, and the model's {vocab_size} tokens are not GPT-2's: {hint}")
    codec = codec_for(meta, f"the meta file in {folder}")
    if codec.size > vocab_size:
        raise UserError(f"the tokenizer of {folder} has {codec.size} tokens, the model {vocab_size}: {hint}")
    return codec


def read_prompt(start: str) -> str:
    """The text that `start` means. Raises UserError if its file cannot be read."""
    if not start.startswith(FILE):
        return start
    name = start.removeprefix(FILE)
    try:
        return read_text(Path(name))
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text" if isinstance(e, UnicodeError) else e
        raise UserError(f"cannot read the prompt {name}: {reason}") from None


def given(arguments: list[str]) -> dict[str, Any]:
    """The keys that the command line and its config files set. Raises UserError for a wrong key, type or value."""
    known = dict(options_of(SampleSettings))
    aliases = {alias: replace(known[name], name=alias) for alias, name in ALIASES.items()}
    values = setting.given(arguments, known | aliases)
    return {ALIASES.get(name, name): value for name, value in values.items()}


if __name__ == "__main__":
    run(main)
