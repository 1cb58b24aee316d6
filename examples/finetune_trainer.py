"""Fine-tune a mixture-of-experts model with Hugging Face's Trainer and the loop.

    python examples/finetune_trainer.py                                       a tiny random OLMoE; needs no network
    python examples/finetune_trainer.py --model=allenai/OLMoE-1B-7B-0924      a model of the hub, or a folder
    python examples/finetune_trainer.py --model=... --text=book.txt --steps=200

Needs transformers and accelerate.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.errors import UserError, first_line, run_script  # first, so that Ctrl-C during the imports is quiet

# isort: split

import torch

from chronomoe import ChronoConfig

README = Path(__file__).resolve().parents[1] / "README.md"


def tiny_model():
    """A random OLMoE whose tokens are bytes, and its tokenizer."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict(vocab_size=256, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = OlmoeForCausalLM(
        OlmoeConfig(**shape, **tokens, num_key_value_heads=4, num_experts=8, num_experts_per_tok=2)
    )
    return model, lambda text: list(text.encode())


def hub_model(name: str):
    """A model of the hub or of a folder, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise UserError(
            f"{name} cannot be loaded: {first_line(e)}; give the name of a model on huggingface.co and a network, or a "
            "folder that save_pretrained wrote, or leave out --model"
        ) from None
    if not tokenizer("some text")["input_ids"]:  # transformers makes an empty one if there are no files
        raise UserError(f"{name} has no tokenizer: save one to the folder with save_pretrained")
    return model, lambda text: tokenizer(text)["input_ids"]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on huggingface.co, or a folder")
    parser.add_argument("--text", default=str(README), help="text to train on")
    parser.add_argument("--out", default="out/finetune", help="folder of checkpoints")
    for name, value in dict(steps=20, batch=4, length=128, seed=1).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    try:
        import accelerate  # noqa: F401
        from transformers import Trainer, TrainingArguments, set_seed
    except ImportError:
        raise UserError("this example needs transformers and accelerate: pip install transformers accelerate") from None
    from chronomoe.callback import ChronoCallback

    set_seed(options.seed)
    model, encode = hub_model(options.model) if options.model else tiny_model()
    try:
        ids = encode(Path(options.text).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--text={options.text} cannot be read as UTF-8 text: {first_line(e)}") from None
    rows = torch.tensor(ids[: len(ids) // options.length * options.length]).view(-1, options.length)
    if not len(rows):
        raise UserError(f"--text={options.text} has {len(ids)} tokens, fewer than --length={options.length}")
    settings = TrainingArguments(
        options.out, max_steps=options.steps, per_device_train_batch_size=options.batch, logging_steps=5,
        learning_rate=1e-4, save_strategy="no", report_to="none", seed=options.seed, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    config = ChronoConfig(router=True, coherence=True, beta=True, bridge=True, lifecycle=True, center=True, eta=1e-2)
    try:
        callback = ChronoCallback(trainer, config)
    except ValueError as e:
        raise UserError(str(e)) from None
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_model()
    print(f"saved to {options.out}, with beta; `chronomoe.attach(model)` continues from it")
    for decision in callback.handle.report():
        print(decision)


if __name__ == "__main__":
    run_script(main)
