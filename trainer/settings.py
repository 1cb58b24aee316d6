"""Every setting of a run: its type, default, range and meaning, in one place.

Keys are nanoMoE's, flat, in config files and as --key=value; the loop's keys are ChronoConfig's, with the prefix
`chrono_`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chronomoe.config import ChronoConfig, missing_steps
from chronomoe.options import Option, option, options_of, same_option
from model import GPTConfig
from trainer.arms import ARMS, CUSTOM, arm_of, contradiction
from trainer.errors import UserError, first_line
from trainer.files import read_text

PREFIX = "chrono_"
# What a change of a setting changes: its `role`.
ROLES = {
    "model": "the shapes of the weights: it cannot change on resume",
    "computed": "what a run computes",
    "data": "the name of the data, which are compared by their sha256",
    "numerics": "the precision of what a run computes; a checkpoint of nanoMoE does not decide it",
    "length": "how many steps a run has: it can grow on resume",
    "machine": "where a run computes, and so its rounding; a checkpoint does not decide it",
    "logging": "what a run writes, and when",
    "start": "one start of the program; a checkpoint does not decide it",
    "study": "how a run is judged in a comparison",
    "arm": "which arm of a comparison the run belongs to",
    "seed": "the random numbers: runs with the same seed are a pair",
}
# Runs that differ in one of these do not compute the same.
COMPARED = ("model", "computed", "numerics", "length", "study")
USAGE = "usage: python train.py [config/FILE.py ...] [--key=value ...] [--help]"


@dataclass
class Settings:
    """A run's settings; `flat()` gives them as the keys that users write."""

    # Run
    out_dir: str = option("out", "folder that the run writes into", role="start")
    init_from: str = option(
        "scratch",
        "'scratch'; 'resume' to continue the run in out_dir; 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a PATH "
        "to a checkpoint: start from these weights; 'auto': resume if there is a checkpoint, else start from scratch; "
        "'auto:gpt2' or 'auto:PATH': else start from these weights",
        role="start",
    )
    seed: int = option(1337, "of initial weights, data order, dropout and router noise", least=0, role="seed")
    arm: str = option(
        "",
        "arm of a comparison: sets the keys that define it; empty: the arm that the keys make, or 'custom'",
        choices=("", *ARMS, CUSTOM),
        role="arm",
    )
    margin: float | None = option(
        None,
        "difference in validation loss, in nats, up to which compare.py calls two arms equivalent; None: never",
        above=0,
        role="study",
    )
    eval_interval: int = option(2000, "steps between evaluations", least=1)
    eval_iters: int = option(200, "validation batches an evaluation, the same ones each time", least=1)
    eval_only: bool = option(False, "evaluate once and stop", role="start")
    log_interval: int = option(1, "steps between log lines", least=1, role="logging")
    always_save_checkpoint: bool = option(True, "save at every evaluation, not only at a new best loss", role="logging")
    checkpoint_interval: int = option(
        0, "steps between checkpoints, beside those at evaluations; 0: none", least=0, role="logging"
    )
    checkpoint_minutes: float = option(
        10.0, "a checkpoint when the last one is so many minutes old; 0: none", least=0, role="logging"
    )

    # Weights & Biases
    wandb_log: bool = option(
        False, "log to Weights & Biases too (offline if not logged in or without network)", role="start"
    )
    wandb_project: str = option("nano-chronomoe", "W&B project", role="start")
    wandb_run_name: str = option("", "W&B run name; empty: the name of out_dir", role="start")

    # Data
    dataset: str = option(
        "openwebtext", "folder under data/ with train.bin and val.bin, or a path to such a folder", role="data"
    )
    gradient_accumulation_steps: int = option(40, "micro-batches a step", least=1)
    batch_size: int = option(12, "sequences a micro-batch", least=1)
    block_size: int = same_option(GPTConfig, "block_size")

    # Model; a default that is given here is that of nanoMoE's train.py where its GPTConfig has another
    n_layer: int = same_option(GPTConfig, "n_layer")
    n_head: int = same_option(GPTConfig, "n_head")
    n_embd: int = same_option(GPTConfig, "n_embd")
    dropout: float = same_option(GPTConfig, "dropout")
    bias: bool = same_option(GPTConfig, "bias", False)

    # Mixture of experts
    n_exp: int = same_option(GPTConfig, "n_exp")
    top_k: int = same_option(GPTConfig, "top_k")
    use_aux_loss: bool = same_option(GPTConfig, "use_aux_loss")
    use_router_z_loss: bool = same_option(GPTConfig, "use_router_z_loss")
    use_noisy_top_k: bool = same_option(GPTConfig, "use_noisy_top_k")
    aux_loss_weight: float = same_option(GPTConfig, "aux_loss_weight", 0.001)
    router_z_loss_weight: float = same_option(GPTConfig, "router_z_loss_weight", 0.01)
    train_capacity: float | None = same_option(GPTConfig, "train_capacity")
    eval_capacity: float | None = same_option(GPTConfig, "eval_capacity")
    min_capacity: int = same_option(GPTConfig, "min_capacity")
    stride: int = same_option(GPTConfig, "stride")
    use_switch_tfm_init: bool = same_option(GPTConfig, "use_switch_tfm_init")
    switch_tfm_init_scale: float = same_option(GPTConfig, "switch_tfm_init_scale")
    router_use_full_prec: bool = same_option(GPTConfig, "router_use_full_prec")
    norm_topk_prob: bool = same_option(GPTConfig, "norm_topk_prob")

    # Optimizer
    learning_rate: float = option(6e-4, "highest learning rate", least=0)
    max_iters: int = option(600000, "optimizer steps", least=0, role="length")
    weight_decay: float = option(1e-1, "AdamW's weight decay", least=0)
    beta1: float = option(0.9, "AdamW", least=0, below=1)
    beta2: float = option(0.95, "AdamW", least=0, below=1)
    grad_clip: float = option(1.0, "gradient norm to clip at; 0: do not clip", least=0)
    decay_lr: bool = option(True, "warm up, then decay the learning rate along a cosine")
    warmup_iters: int = option(2000, "steps of warm-up", least=0, needs="decay_lr")
    lr_decay_iters: int = option(600000, "step at which the learning rate reaches min_lr", least=0, needs="decay_lr")
    min_lr: float = option(6e-5, "lowest learning rate", least=0, needs="decay_lr")

    # System
    backend: str = option("nccl", "torch.distributed backend between GPUs; on CPUs it is gloo", role="machine")
    device: str = option(
        "auto", "'auto' (CUDA if there is one, else the CPU), 'cpu', 'cuda', 'cuda:1', 'mps'", role="machine"
    )
    dtype: str = option(
        "auto",
        "'auto': bfloat16 or float16 on CUDA, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
        role="numerics",
    )
    compile: bool = option(False, "torch.compile the model", role="numerics")

    # The loop
    chrono: ChronoConfig = field(default_factory=ChronoConfig)

    def flat(self) -> dict[str, Any]:
        """Every key and its value."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "chrono"}
        return own | {PREFIX + name: value for name, value in vars(self.chrono).items()}

    @property
    def tokens_per_step(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size * self.block_size

    def model_args(self, vocab_size: int) -> dict[str, Any]:
        """GPTConfig's arguments."""
        names = [f.name for f in dataclasses.fields(GPTConfig) if hasattr(self, f.name)]
        return {name: getattr(self, name) for name in names} | {"vocab_size": vocab_size}


def keys() -> dict[str, Option]:
    """Every key of train.py by name, in the order of --help."""
    return dict(options_of(Settings)) | dict(options_of(ChronoConfig, PREFIX))


def names_with_role(*roles: str) -> tuple[str, ...]:
    """The keys whose change changes what `roles` say."""
    return tuple(name for name, key in keys().items() if key.role in roles)


def check(key: Option, value: Any, where: str) -> Any:
    """The value in the key's type. Raises UserError, which says `where`, if its type or range is wrong."""
    try:
        return key.check(value)
    except ValueError as e:
        raise UserError(f"{where}: {e}") from None


def help_text(known: dict[str, Option] | None = None, usage: str = USAGE) -> str:
    """What `--help` prints. known: the keys, by default train.py's; so in the functions below."""
    lines = [usage, "", "Config files are Python: assignments to these keys. Later files and --key=value win.", ""]
    for key in (known or keys()).values():
        choices = key.metadata["choices"]
        takes = f" ({key.expected()})" if choices and "'" not in key.metadata["help"] else ""
        lines.append(f"  {key.name} = {key.default!r}\n      {key.metadata['help']}{takes}")
    return "\n".join(lines)


def from_arguments(arguments: list[str]) -> Settings:
    """Settings from the command line. Raises UserError for a wrong key, type, value or combination."""
    return from_values(given(arguments))


def given(arguments: list[str], known: dict[str, Option] | None = None) -> dict[str, Any]:
    """The keys that the command line and its config files set. Raises UserError for a wrong key, type or value."""
    values: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    known = known or keys()
    for argument in arguments:
        if not argument.startswith("-"):
            values |= read_config_file(argument, known)
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"{argument}: write settings as --key=value")
        key = known.get(name) or unknown(name, argument, known)
        overrides[name] = check(key, parse_value(key, text), "command line")
    # --arm wins over config files; an arm that a config file names must agree with the other keys
    arm = overrides.get("arm", values.get("arm"))
    explicit = overrides if "arm" in overrides else values | overrides
    for name, value in ARMS.get(arm, {}).items():
        if explicit.get(name, value) != value:
            raise UserError(f"{name}={explicit[name]!r}, but arm={arm!r} means {name}={value!r}: leave one of them out")
    return values | ARMS.get(arm, {}) | overrides


def from_values(values: dict[str, Any]) -> Settings:
    """Settings from checked keys. Raises UserError for a combination that makes no sense."""
    steps = {name.removeprefix(PREFIX): v for name, v in values.items() if name.startswith(PREFIX)}
    rest = {name: v for name, v in values.items() if not name.startswith(PREFIX)}
    # checked here, so that the message has the keys that users write
    for step, needed in missing_steps(types.SimpleNamespace(**(_defaults(ChronoConfig) | steps))):
        by_arm = f" (arm={rest['arm']!r} sets it)" if PREFIX + step in ARMS.get(rest.get("arm"), {}) else ""
        raise UserError(f"{PREFIX}{step}=True{by_arm} needs {PREFIX}{needed}=True")
    settings = Settings(**rest, chrono=ChronoConfig(**steps))
    if settings.chrono.steps_on() and settings.n_exp == 1:
        raise UserError(
            f"{PREFIX}{settings.chrono.steps_on()[0]}=True needs experts to route between: set n_exp above 1"
        )
    try:
        GPTConfig(**settings.model_args(vocab_size=1))
    except ValueError as e:
        raise UserError(str(e)) from None
    wrong = contradiction(settings.arm, settings.flat())
    if wrong is not None:
        raise UserError(
            f"{wrong}={settings.flat()[wrong]!r}, but arm={settings.arm!r} means {wrong}={ARMS[settings.arm][wrong]!r}"
        )
    settings.arm = settings.arm or arm_of(settings.flat())
    return settings


def read_config_file(path: str, known: dict[str, Option] | None = None) -> dict[str, Any]:
    """The keys that a config file sets. It is Python and is executed; names that start with _ are its own."""
    try:
        source = read_text(Path(path)).removeprefix("\ufeff")
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text" if isinstance(e, UnicodeError) else e
        raise UserError(f"cannot read the config file {path}: {reason}{_nearest_config(path)}") from None
    namespace: dict[str, Any] = {"__file__": path, "__name__": "__config__"}
    try:
        exec(compile(source, path, "exec"), namespace)
    except SyntaxError as e:
        raise UserError(f"{e.filename}, line {e.lineno}: {e.msg}") from None
    except (Exception, SystemExit) as e:
        line = e.__traceback__.tb_next.tb_lineno if e.__traceback__ and e.__traceback__.tb_next else "?"
        raise UserError(f"{path}, line {line}: {type(e).__name__}: {first_line(e)}") from None
    known = known or keys()
    ours = (bool, int, float, str, type(None))
    values = {}
    for name, value in namespace.items():
        value = value.item() if isinstance(value, np.generic) else value
        if name.startswith("_") or (name not in known and not isinstance(value, ours)):
            continue  # imports, functions and the file's own names
        key = known.get(name) or unknown(name, path, known)
        values[name] = check(key, value, path)
    return values


def parse_value(key: Option, text: str) -> Any:
    """The value of --key=text: text itself for a string key, else a Python literal."""
    if key.type is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def unknown(name: str, where: str, known: dict[str, Option]) -> typing.NoReturn:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists them"
    if name in keys():
        hint = "it is one of train.py, and a run is named by --out_dir"
    raise UserError(f"{where}: there is no setting {name!r}; {hint}")


def _defaults(owner: type) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(owner)}


def _nearest_config(path: str) -> str:
    root = Path(__file__).parent.parent
    files = [str(p.relative_to(root)) for p in (root / "config").rglob("*.py") if p.name != "__init__.py"]
    near = difflib.get_close_matches(path, files, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
