"""Sample text from a trained run, or from GPT-2.

python sample.py --out_dir=out/vertical_slice --prompt="def " --num_samples=2 --max_new_tokens=200
python sample.py --out_dir=out/vertical_slice --prompt="def " --beta=off
python sample.py --init_from=gpt2 --prompt=FILE:prompt.txt
python sample.py --help
"""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from chronomoe.options import option, options_of, same_option
from data.tokenizer import GPT2_TOKENIZER, Codec, TiktokenCodec, codec_for, encoding_for
from model import GPT, GPT2_MODELS
from trainer import checkpoint
from trainer import settings as setting
from trainer.data import DATA, read_meta
from trainer.device import autocast_context, resolve_dtype, select_device
from trainer.errors import UserError, run_script
from trainer.files import read_text
from trainer.settings import Settings
from trainer.weights import build_model, find_weights, is_gpt2, load_checkpoint

GPT2_TOKENS = 50257
FILE = "FILE:"
ALIASES = {"prompt": "start"}
SEPARATOR = "-" * 15
USAGE = "usage: python sample.py [FILE.py ...] [--key=value ...] [--help]"


@dataclass
class SampleSettings:
    """nanoGPT's keys, and this program's own. `python sample.py --help` lists them."""

    init_from: str = option(
        "resume", f"'resume': the run in out_dir; {', '.join(GPT2_MODELS)}; or a PATH to a checkpoint"
    )
    out_dir: str = option("out", "folder of the run")
    start: str = option("", "prompt, also --prompt; FILE:name reads a file; empty: the start of a text")
    num_samples: int = option(10, "number of samples", least=1)
    max_new_tokens: int = option(500, "new tokens per sample", least=1)
    temperature: float = option(0.8, "below 1 more predictable, above 1 less; 0: the most likely token", least=0)
    top_k: int | None = option(200, "sample from the top_k most likely tokens; None: from all", least=1)
    seed: int = option(1337, "the same seed gives the same samples", least=0)
    beta: str = option("on", "'off': sample with every expert's beta set to 0", choices=("on", "off"))
    dataset: str = option("", "dataset whose tokenizer to use: a folder under data/, or a path; empty: the run's own")
    device: str = same_option(Settings, "device")
    dtype: str = same_option(Settings, "dtype")
    compile: bool = same_option(Settings, "compile")


def main(arguments: list[str]) -> int:
    """Print samples as the arguments say. Returns the exit status: 0, 130 after Ctrl-C, 141 if the pipe was closed."""
    if "--help" in arguments or "-h" in arguments:
        print(setting.help_text(dict(options_of(SampleSettings)), USAGE))
        return 0
    s = SampleSettings(**given(arguments))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may not support a character
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
    """Print num_samples samples, each token as it is sampled, separated by a line of dashes. Notes go to stderr."""
    prompt = read_prompt(s.start)
    device = select_device(s.device)
    autocast = autocast_context(resolve_dtype(s.dtype, device), device)
    model, codec, notes = load(s)
    model.to(device).eval()
    ids = codec.encode(prompt)
    for note in [*notes, f"beta: {apply_beta(model, s.beta)}"]:
        print(note, file=sys.stderr)
    if s.compile:
        torch._dynamo.config.capture_scalar_outputs = True  # the loop over experts reads their token counts
        model.compile()
    idx = torch.tensor([ids or codec.start], device=device)
    generator = torch.Generator(device).manual_seed(s.seed)
    for i in range(s.num_samples):
        if i:
            print(SEPARATOR)
        print(codec.decode(ids), end="", flush=True)  # the prompt as the model sees it
        try:
            with autocast():
                sampled = model.stream(idx, s.max_new_tokens, s.temperature, s.top_k, generator)
                for text in codec.decode_stream(int(token.item()) for token in sampled):
                    print(text, end="", flush=True)
        except ValueError as e:
            raise UserError(str(e)) from None
        print(flush=True)


def apply_beta(model: GPT, beta: str) -> str:
    """Set beta to 0 if `beta` is 'off'. Returns a description of the beta that routing uses."""
    coefficients = model.router_state.beta_coeff
    if not (model.config.chrono.router and coefficients.any()):
        return "none, the model has learnt none"
    if beta == "on":
        return "on, as trained"
    coefficients.zero_()
    return "off, set to 0 for every expert"


def load(s: SampleSettings) -> tuple[GPT, Codec, list[str]]:
    """The model of init_from, on the CPU, its tokenizer, and notes on where it comes from. Raises UserError."""
    notes: list[str] = []
    if is_gpt2(s.init_from):
        codec = TiktokenCodec(encoding_for(GPT2_TOKENIZER))
        weights, model_args = find_weights(s.init_from)
        return build_model({"model": weights, "model_args": model_args}, s.init_from), codec, [f"model: {s.init_from}"]
    if s.init_from == "resume":
        source = s.out_dir
        saved, notes, _ = checkpoint.newest(Path(s.out_dir))
    else:
        source = s.init_from
        saved = load_checkpoint(source)
    model = build_model(saved, source)
    config = saved.get("config")
    dataset = s.dataset or (config.get("dataset") if isinstance(config, dict) else None)
    notes.append(f"model: {source}, step {saved['iter_num']}")
    return model, find_codec(dataset, model.config.vocab_size), notes


def find_codec(dataset: Any, vocab_size: int) -> Codec:
    """The tokenizer of a dataset, from its meta file. Raises UserError if there is none or it does not fit."""
    hint = "give --dataset=NAME or a path to choose a tokenizer"
    if not isinstance(dataset, str):
        raise UserError(f"the checkpoint does not name its dataset: {hint}")
    folder = next((path for path in (DATA / dataset, Path(dataset)) if path.is_dir()), None)
    if folder is None:
        raise UserError(f"there is no dataset {dataset!r}, neither {DATA / dataset} nor a path: {hint}")
    meta = read_meta(folder)
    if not meta and vocab_size < GPT2_TOKENS:
        raise UserError(f"{folder} has no meta.json, and the model's {vocab_size} tokens are not GPT-2's: {hint}")
    codec = codec_for(meta, f"the meta file in {folder}")
    if codec.size > vocab_size:
        raise UserError(f"the tokenizer of {folder} has {codec.size} tokens, the model {vocab_size}: {hint}")
    return codec


def read_prompt(start: str) -> str:
    """The prompt that `start` describes. Raises UserError if its file cannot be read."""
    if not start.startswith(FILE):
        return start
    name = start.removeprefix(FILE)
    try:
        return read_text(Path(name))
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text" if isinstance(e, UnicodeError) else e
        raise UserError(f"cannot read the prompt {name}: {reason}") from None


def given(arguments: list[str]) -> dict[str, Any]:
    """The settings that the command line and its config files give. Raises UserError for a wrong key, type or value."""
    known = dict(options_of(SampleSettings))
    aliases = {alias: replace(known[name], name=alias) for alias, name in ALIASES.items()}
    values = setting.given(arguments, known | aliases)
    return {ALIASES.get(name, name): value for name, value in values.items()}


if __name__ == "__main__":
    run_script(main)
