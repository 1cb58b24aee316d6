"""Sample text from a trained run, or from GPT-2.

python sample.py --out_dir=out/vertical_slice --prompt="def " --num_samples=2 --max_new_tokens=200
python sample.py --out_dir=out/vertical_slice --prompt="def " --beta=off
python sample.py --init_from=gpt2 --prompt=FILE:prompt.txt
python sample.py --out_dir=out/vertical_slice --explore=out/explorer.html
python sample.py --help
"""

from __future__ import annotations

from trainer.errors import UserError, run_script  # first, so that Ctrl-C during the other imports is quiet

# isort: split

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chronomoe.options import option, options_of, same_option
from comparison import explorer
from data.tokenizer import GPT2_TOKENIZER, Codec, TiktokenCodec, codec_for, encoding_for
from model import GPT, GPT2_MODELS
from trainer import checkpoint, cli
from trainer.data import DATA, open_dataset, read_meta
from trainer.device import autocast_context, resolve_dtype, select_device
from trainer.memory import one_line_out_of_memory
from trainer.settings import Settings, keys
from trainer.weights import build_model, checkpoint_path, find_weights, is_gpt2, load_checkpoint

GPT2_TOKENS = 50257
FILE = "FILE:"
SEPARATOR = "-" * 15
USAGE = f"usage: python sample.py [FILE.py ...] [--key=value ...] [--help]\n\n{cli.CONFIG_FILES}"


@dataclass
class SampleSettings:
    """The settings of sample.py, by nanoGPT's keys where it has them."""

    init_from: str = option(
        "resume",
        f"model: 'resume' for the run in out_dir, {', '.join(map(repr, GPT2_MODELS))}, or a PATH to a checkpoint",
    )
    out_dir: str = option("out", "folder of the run")
    start: str = option("", "prompt (also --prompt); FILE:NAME reads it from a file; empty: begin a new text")
    num_samples: int = option(10, "number of samples", least=1)
    max_new_tokens: int = option(500, "new tokens per sample", least=1)
    temperature: float = option(
        0.8, "divides the logits; below 1 samples are more predictable; 0: always the most likely token", least=0
    )
    top_k: int | None = option(200, "sample from this many of the most likely tokens; None: from all", least=1)
    seed: int = option(1337, "seed of the random numbers", least=0)
    beta: str = option("on", "'on': the trained beta; 'off': beta is 0 for every expert", choices=("on", "off"))
    dataset: str = option(
        "", "folder under data/, or a path to a folder, whose tokenizer to use; empty: the dataset of the run"
    )
    explore: str = option(
        "", "write a page to this file that shows the routing of the prompt or, without one, of validation text"
    )
    device: str = same_option(Settings, "device")
    dtype: str = same_option(Settings, "dtype")
    compile: bool = same_option(Settings, "compile")


def main(arguments: list[str]) -> int:
    """Print samples. Returns the exit status: 0, or 130 after Ctrl-C."""
    if cli.asks_for_help(arguments):
        print(cli.help_text(USAGE, options_of(SampleSettings)))
        return 0
    s = from_arguments(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may not support a character
    try:
        with one_line_out_of_memory("use a smaller model, or --device=cpu"):
            if s.explore:
                explore(s)
            else:
                sample(s)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def sample(s: SampleSettings) -> None:
    """Print num_samples samples, token by token, separated by lines of dashes. Notes are printed to stderr."""
    prompt = read_prompt(s.start)
    device = select_device(s.device)
    autocast = autocast_context(resolve_dtype(s.dtype, device), device)
    model, codec, _, notes = load(s)
    model.to(device).eval()
    ids = codec.encode(prompt)
    for note in [*notes, f"beta: {apply_beta(model, s.beta)}"]:
        print(note, file=sys.stderr)
    if s.compile:
        torch._dynamo.config.capture_scalar_outputs = True  # the loop over experts reads token counts
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


def explore(s: SampleSettings) -> None:
    """Write the page of comparison/explorer.py for the prompt, or for validation text."""
    device = select_device(s.device)
    autocast = autocast_context(resolve_dtype(s.dtype, device), device)
    model, codec, dataset, notes = load(s)
    model.to(device).eval()
    length, text = model.config.block_size, codec.encode(read_prompt(s.start))
    if text:
        windows = [torch.tensor(text[:length], device=device)]
    else:
        if dataset is None:
            raise UserError("give --dataset=NAME, or a --prompt: the model does not name its dataset")
        data, count = open_dataset(dataset, length), explorer.num_windows(model, length)
        windows = list(data.batch("val", s.seed, 0, 0, count)[0].to(device))
    found, path = explorer.explore(model, codec, windows, autocast), Path(s.explore)
    explorer.write(path, found, "; ".join(notes))
    for note in notes:
        print(note, file=sys.stderr)
    print(f"the routing of {sum(map(len, windows)):,} tokens is in {path}")


def apply_beta(model: GPT, beta: str) -> str:
    """Set beta to 0 if `beta` is 'off'. Returns a description of the beta that routing uses."""
    coefficients = model.router_state.beta_coeff
    if not (model.config.chrono.router and coefficients.any()):
        return "none, the model has learnt none"
    if beta == "on":
        return "on, as trained"
    coefficients.zero_()
    return "off, set to 0 for every expert"


def load(s: SampleSettings) -> tuple[GPT, Codec, str | None, list[str]]:
    """The model of init_from on the CPU, its tokenizer, its dataset, and notes on where it comes from.

    Raises UserError.
    """
    notes: list[str] = []
    if is_gpt2(s.init_from):
        codec = TiktokenCodec(encoding_for(GPT2_TOKENIZER))
        weights, model_args = find_weights(s.init_from)
        model = build_model({"model": weights, "model_args": model_args}, s.init_from)
        return model, codec, s.dataset or None, [f"model: {s.init_from}"]
    if s.init_from == "resume":
        source = s.out_dir
        saved, notes, _ = checkpoint.newest(Path(s.out_dir))
    else:
        source = s.init_from
        saved, notes = load_checkpoint(source), checkpoint.notes_on(checkpoint_path(source))
    model = build_model(saved, source)
    config = saved.get("config")
    dataset = s.dataset or (config.get("dataset") if isinstance(config, dict) else None)
    notes.append(f"model: {source}, step {saved['iter_num']}")
    return model, find_codec(dataset, model.config.vocab_size), dataset, notes


def find_codec(dataset: Any, vocab_size: int) -> Codec:
    """The tokenizer of a dataset. Raises UserError if the dataset is not found or its tokenizer has too many tokens."""
    hint = "give --dataset=NAME or a path to choose a tokenizer"
    if not isinstance(dataset, str):
        raise UserError(f"the checkpoint does not name its dataset: {hint}")
    folder = next((path for path in (DATA / dataset, Path(dataset)) if os.path.isdir(path)), None)
    if folder is None:
        raise UserError(f"there is no dataset {dataset!r}, in {DATA} or as a path: {hint}")
    meta = read_meta(folder)
    if not meta and vocab_size < GPT2_TOKENS:
        raise UserError(f"{folder} has no meta.json, and the model has {vocab_size} tokens, fewer than GPT-2: {hint}")
    codec = codec_for(meta, f"the meta file in {folder}")
    if codec.size > vocab_size:
        raise UserError(f"the tokenizer of {folder} has {codec.size} tokens, the model {vocab_size}: {hint}")
    return codec


def read_prompt(start: str) -> str:
    """The prompt, read from a file for FILE:NAME. Raises UserError if the file cannot be read."""
    return cli.read_text_file(start.removeprefix(FILE), "prompt") if start.startswith(FILE) else start


def from_arguments(arguments: list[str]) -> SampleSettings:
    """Settings from a command line and its config files. Raises UserError for a wrong key, type or value."""
    options = options_of(SampleSettings)
    known = {**options, "prompt": options["start"]}
    hints = {key: f"{key} is a key of train.py; name the run by --out_dir" for key in keys()}
    return SampleSettings(**cli.parse(arguments, known, config_files=True, hints=hints).values)


if __name__ == "__main__":
    run_script(main)
