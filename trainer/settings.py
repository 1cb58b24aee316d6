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

from chronomoe.config import ChronoConfig, missing_steps, option
from model import GPTConfig
from trainer.errors import UserError, first_line
from trainer.files import read_text

PREFIX = "chrono_"
OVERLAP_THRESHOLD = 0.1  # chrono_bridge_threshold's default where the bridge reads the overlap
LARGEST = {int: 2**63, float: 1e300}  # no seed, count or rate is beyond; nan is not below it either
USAGE = "usage: python train.py [config/FILE.py ...] [--key=value ...] [--help]"


@dataclass
class Settings:
    """A run's settings; `flat()` gives them as the keys that users write."""

    # Run
    out_dir: str = option("out", "folder that the run writes into")
    init_from: str = option(
        "scratch",
        "'scratch'; 'resume' to continue the run in out_dir; 'auto': resume if there is a checkpoint, else start; "
        "'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a PATH to a checkpoint: start from these weights",
    )
    seed: int = option(1337, "of initial weights, data order, dropout and router noise", least=0)
    eval_interval: int = option(2000, "steps between evaluations", least=1)
    eval_iters: int = option(200, "validation batches an evaluation, the same ones each time", least=1)
    eval_only: bool = option(False, "evaluate once and stop")
    log_interval: int = option(1, "steps between log lines", least=1)
    always_save_checkpoint: bool = option(True, "save at every evaluation, not only at a new best loss")
    checkpoint_interval: int = option(0, "steps between checkpoints, beside those at evaluations; 0: none", least=0)
    checkpoint_minutes: float = option(10.0, "a checkpoint when the last one is so many minutes old; 0: none", least=0)

    # Weights & Biases
    wandb_log: bool = option(False, "log to Weights & Biases too (offline if not logged in or without network)")
    wandb_project: str = option("nano-chronomoe", "W&B project")
    wandb_run_name: str = option("", "W&B run name; empty: the name of out_dir")

    # Data
    dataset: str = option("openwebtext", "folder under data/ with train.bin and val.bin, or a path to such a folder")
    gradient_accumulation_steps: int = option(40, "micro-batches a step", least=1)
    batch_size: int = option(12, "sequences a micro-batch", least=1)
    block_size: int = option(1024, "tokens a sequence", least=1)

    # Model
    n_layer: int = option(12, "transformer blocks", least=1)
    n_head: int = option(12, "attention heads", least=1)
    n_embd: int = option(768, "width", least=1)
    dropout: float = option(0.0, "dropout probability", least=0, below=1)
    bias: bool = option(False, "biases in linear layers and layer norms")

    # Mixture of experts
    n_exp: int = option(1, "experts in a MoE layer; 1 is a dense model", least=1)
    top_k: int = option(2, "experts a token", least=1)
    norm_topk_prob: bool = option(
        True,
        "gates are the softmax over the top_k chosen experts; False: over all experts, without which top_k=1 trains no "
        "router",
    )
    use_aux_loss: bool = option(False, "add Switch Transformer's load-balancing loss")
    use_router_z_loss: bool = option(False, "add ST-MoE's router z-loss")
    use_noisy_top_k: bool = option(False, "learnt noise on the routing logits while training")
    aux_loss_weight: float = option(0.001, "weight of the load-balancing loss", least=0)
    router_z_loss_weight: float = option(0.01, "weight of the router z-loss", least=0)
    train_capacity: float | None = option(None, "capacity factor of an expert while training; None: dropless", above=0)
    eval_capacity: float | None = option(None, "capacity factor of an expert in evaluation; None: dropless", above=0)
    min_capacity: int = option(4, "tokens that an expert with a capacity takes at least", least=0)
    stride: int = option(2, "every stride-th block is a MoE layer, from block 0", least=1)
    use_switch_tfm_init: bool = option(False, "Switch Transformer's initial weights")
    switch_tfm_init_scale: float = option(1.0, "their scale", above=0)
    router_use_full_prec: bool = option(False, "routing logits without autocast (on CUDA float32 matmuls use TF32)")

    # Optimizer
    learning_rate: float = option(6e-4, "highest learning rate", least=0)
    max_iters: int = option(600000, "optimizer steps", least=0)
    weight_decay: float = option(1e-1, "AdamW's weight decay", least=0)
    beta1: float = option(0.9, "AdamW", least=0, below=1)
    beta2: float = option(0.95, "AdamW", least=0, below=1)
    grad_clip: float = option(1.0, "gradient norm to clip at; 0: do not clip", least=0)
    decay_lr: bool = option(True, "warm up, then decay the learning rate along a cosine")
    warmup_iters: int = option(2000, "steps of warm-up", least=0)
    lr_decay_iters: int = option(600000, "step at which the learning rate reaches min_lr", least=0)
    min_lr: float = option(6e-5, "lowest learning rate", least=0)

    # System
    backend: str = option("nccl", "torch.distributed backend between GPUs; on CPUs it is gloo")
    device: str = option("auto", "'auto' (CUDA if there is one, else the CPU), 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = option(
        "auto",
        "'auto': bfloat16 or float16 on CUDA, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: bool = option(False, "torch.compile the model")

    # The loop
    chrono: ChronoConfig = field(default_factory=ChronoConfig)

    def flat(self) -> dict[str, Any]:
        """Every key and its value."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "chrono"}
        return own | {PREFIX + name: value for name, value in vars(self.chrono).items()}

    def model_args(self, vocab_size: int) -> dict[str, Any]:
        """GPTConfig's arguments."""
        names = [f.name for f in dataclasses.fields(GPTConfig) if hasattr(self, f.name)]
        return {name: getattr(self, name) for name in names} | {"vocab_size": vocab_size}


@dataclass(frozen=True)
class Key:
    """One setting as users see it."""

    name: str
    default: Any
    type: Any
    metadata: typing.Mapping[str, Any]

    @property
    def optional(self) -> bool:
        """None is a value of it."""
        return isinstance(self.type, types.UnionType)

    @property
    def kind(self) -> type:
        """bool, int, float or str."""
        return typing.get_args(self.type)[0] if self.optional else self.type

    def check(self, value: Any, where: str) -> Any:
        """value in the key's type. Raises UserError if its type or range is wrong."""
        if value is None and self.optional:
            return None
        kind = self.kind
        is_number = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST.get(kind, 0)
        )
        if kind is float and is_number:
            value = float(value)
        elif kind is int and is_number and value == int(value):
            value = int(value)
        elif kind in (int, float) or not isinstance(value, kind):
            raise UserError(f"{where}: {self.name}={value!r} must be {self.expected()}")
        m = self.metadata
        if (
            (m["choices"] is not None and value not in m["choices"])
            or (m["least"] is not None and not value >= m["least"])
            or (m["above"] is not None and not value > m["above"])
            or (m["most"] is not None and not value <= m["most"])
            or (m["below"] is not None and not value < m["below"])
        ):
            near = difflib.get_close_matches(str(value), m["choices"] or (), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: {self.name}={value!r} must be {self.expected()}{hint}")
        return value

    def expected(self) -> str:
        """What the key takes, in words."""
        m = self.metadata
        if m["choices"] is not None:
            return "one of " + ", ".join(repr(c) for c in m["choices"])
        words = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}[self.kind]
        bounds = [("least", "at least"), ("above", "above"), ("most", "at most"), ("below", "below")]
        limits = " and ".join(f"{word} {m[name]}" for name, word in bounds if m[name] is not None)
        none = " or None" if self.optional else ""
        return f"{words} {limits}".rstrip() + none


def keys() -> dict[str, Key]:
    """Every key of train.py by name, in the order of --help."""
    return keys_of(Settings) | keys_of(ChronoConfig, PREFIX)


def keys_of(owner: type, prefix: str = "") -> dict[str, Key]:
    """The keys that a dataclass of options makes, by name."""
    hints = typing.get_type_hints(owner)
    fields = [f for f in dataclasses.fields(owner) if f.name != "chrono"]
    return {prefix + f.name: Key(prefix + f.name, f.default, hints[f.name], f.metadata) for f in fields}


def help_text(known: dict[str, Key] | None = None, usage: str = USAGE) -> str:
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


def given(arguments: list[str], known: dict[str, Key] | None = None) -> dict[str, Any]:
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
        overrides[name] = key.check(parse_value(key, text), "command line")
    return values | overrides


def from_values(values: dict[str, Any]) -> Settings:
    """Settings from checked keys. Raises UserError for a combination that makes no sense."""
    steps = {name.removeprefix(PREFIX): v for name, v in values.items() if name.startswith(PREFIX)}
    rest = {name: v for name, v in values.items() if not name.startswith(PREFIX)}
    # checked here, so that the message has the keys that users write
    for step, needed in missing_steps(types.SimpleNamespace(**(_defaults(ChronoConfig) | steps))):
        raise UserError(f"{PREFIX}{step}=True needs {PREFIX}{needed}=True")
    if steps.get("bridge_signal") == "overlap":
        steps = {"bridge_threshold": OVERLAP_THRESHOLD} | steps
    settings = Settings(**rest, chrono=ChronoConfig(**steps))
    if settings.chrono.steps_on() and settings.n_exp == 1:
        raise UserError(
            f"{PREFIX}{settings.chrono.steps_on()[0]}=True needs experts to route between: set n_exp above 1"
        )
    try:
        GPTConfig(**settings.model_args(vocab_size=1))
    except ValueError as e:
        raise UserError(str(e)) from None
    return settings


def read_config_file(path: str, known: dict[str, Key] | None = None) -> dict[str, Any]:
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
        values[name] = key.check(value, path)
    return values


def parse_value(key: Key, text: str) -> Any:
    """The value of --key=text: text itself for a string key, else a Python literal."""
    if key.type is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def unknown(name: str, where: str, known: dict[str, Key]) -> typing.NoReturn:
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
