"""Every setting of a run: its type, default, range, meaning and role.

Keys are nanoMoE's. They are set in config files or as --key=value (trainer/cli.py). The keys of the loop are those of
ChronoConfig with the prefix `chrono_`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chronomoe.config import ChronoConfig, missing_steps
from chronomoe.options import Option, option, options_of, same_option
from chronomoe.schedule import parse_schedule
from model import GPT2_MODELS, GPTConfig
from trainer import cli
from trainer.arms import ARMS, CUSTOM, arm_of, check_arm
from trainer.errors import UserError

PREFIX = "chrono_"
ID = "{id}"
MAX_TAG = 64
# Runs that differ in a setting with one of these roles do not compute the same.
COMPARED = ("model", "computed", "numerics", "length", "study")
USAGE = f"usage: python train.py [config/FILE.py ...] [--key=value ...] [--help]\n\n{cli.CONFIG_FILES}"


@dataclass
class Settings:
    """The settings of a run. `flat()` returns them by the keys that users write."""

    out_dir: str = option(
        "out",
        "folder that the run writes to; {id} in it stands for WANDB_RUN_ID, which `wandb agent` sets",
        role="start",
        group="Run",
    )
    init_from: str = option(
        "scratch",
        "'scratch': new weights; 'resume': continue the run in out_dir; "
        f"{', '.join(map(repr, GPT2_MODELS))} or a PATH to a checkpoint: start from these weights; 'auto': resume if "
        "out_dir has a checkpoint, else start from scratch; 'auto:gpt2' or 'auto:PATH': else start from these weights",
        role="start",
    )
    seed: int = option(1337, "seed of the initial weights, data order, dropout and router noise", least=0, role="seed")
    arm: str = option(
        "",
        "arm of a comparison; sets the keys that define the arm; empty: the arm that the other keys define",
        choices=("", *ARMS, CUSTOM),
        role="arm",
    )
    margin: float | None = option(
        None,
        "compare.py calls two arms equivalent up to this difference in validation loss, in nats; None: never",
        above=0,
        role="study",
    )
    protocol: str = option(
        "",
        "file that describes the study before its runs; each run records the last commit of this file",
        role="study",
    )
    eval_interval: int = option(2000, "steps between evaluations", least=1)
    eval_iters: int = option(200, "validation batches per evaluation, the same in every evaluation", least=1)
    eval_only: bool = option(False, "evaluate once, then stop", role="start")
    log_interval: int = option(1, "steps between log lines", least=1, role="logging")
    always_save_checkpoint: bool = option(
        True, "save a checkpoint at every evaluation, not only at a new best loss", role="logging"
    )
    checkpoint_interval: int = option(
        0, "steps between checkpoints, in addition to those at evaluations; 0: none", least=0, role="logging"
    )
    checkpoint_minutes: float = option(
        10.0, "save a checkpoint when the last one is this many minutes old; 0: never", least=0, role="logging"
    )

    wandb_log: bool = option(
        False,
        "log to Weights & Biases too; offline without a login or a network",
        role="start",
        group="Weights & Biases",
    )
    wandb_project: str = option("nano-chronomoe", "project in W&B", role="start")
    wandb_run_name: str = option("", "name of the run in W&B; empty: the name of out_dir", role="start")
    wandb_group: str = option(
        "",
        "group in W&B; empty: a name that tells apart all settings except the seed and the arms off, on and shuffled",
        role="start",
    )
    wandb_tags: str = option(
        "", "tags in W&B, separated by commas, in addition to steps, signal and seed", role="start"
    )
    wandb_notes: str = option("", "notes in W&B", role="start")
    wandb_artifacts: bool = option(
        False,
        "at the end, upload the last and the best checkpoint as an artifact; compare.py: the report",
        role="start",
    )
    tensorboard: bool = option(
        False,
        "log to out_dir/tensorboard too; needs the package tensorboard",
        role="start",
        group="TensorBoard",
    )

    dataset: str = option(
        "openwebtext",
        "folder under data/, or a path to a folder, with train.bin and val.bin",
        role="data",
        group="Data",
    )
    data_schedule: str = option(
        "",
        "datasets by training step, as 'stdlib@0 prose@400 stdlib@800'; begins with `dataset`, which val/loss is of; "
        "every evaluation measures all of them (val/prose/loss); empty: `dataset` in all steps",
    )
    gradient_accumulation_steps: int = option(40, "micro-batches per step, over all ranks", least=1)
    batch_size: int = option(12, "sequences per micro-batch", least=1)
    block_size: int = same_option(GPTConfig, "block_size")

    # a default here is that of nanoMoE's train.py where nanoMoE's GPTConfig has another
    n_layer: int = same_option(GPTConfig, "n_layer", group="Model")
    n_head: int = same_option(GPTConfig, "n_head")
    n_embd: int = same_option(GPTConfig, "n_embd")
    dropout: float = same_option(GPTConfig, "dropout")
    bias: bool = same_option(GPTConfig, "bias", False)

    n_exp: int = same_option(GPTConfig, "n_exp", group="Mixture of experts")
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

    learning_rate: float = option(6e-4, "highest learning rate", least=0, group="Optimizer")
    max_iters: int = option(600000, "optimizer steps", least=0, role="length")
    weight_decay: float = option(1e-1, "weight decay of AdamW", least=0)
    beta1: float = option(0.9, "beta1 of AdamW", least=0, below=1)
    beta2: float = option(0.95, "beta2 of AdamW", least=0, below=1)
    grad_clip: float = option(
        1.0, "largest gradient norm; larger gradients are scaled down to it; 0: no clipping", least=0
    )
    decay_lr: bool = option(True, "warm up the learning rate linearly, then decay it along a cosine; False: constant")
    warmup_iters: int = option(2000, "steps of warm-up", least=0, only_with="decay_lr")
    lr_decay_iters: int = option(
        600000, "step at which the learning rate reaches min_lr", least=0, only_with="decay_lr"
    )
    min_lr: float = option(6e-5, "lowest learning rate", least=0, only_with="decay_lr")

    backend: str = option(
        "nccl", "torch.distributed backend between GPUs; CPUs always use gloo", role="machine", group="System"
    )
    device: str = option(
        "auto", "'auto' (CUDA if available, else the CPU), 'cpu', 'cuda', 'cuda:1' or 'mps'", role="machine"
    )
    dtype: str = option(
        "auto",
        "precision of forward; 'auto': bfloat16 (float16 if unsupported) on CUDA, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
        role="numerics",
    )
    compile: bool = option(False, "compile the model with torch.compile", role="numerics")
    fuse: bool = option(
        True,
        "on CUDA, fuse kernels of the loop, the statistics, and MoE layers in bfloat16 (compute capability 9.0, 10.0) "
        "with torch.compile",
        role="numerics",
    )
    cuda_graphs: bool = option(
        False,
        "replay forward and backward as CUDA graphs; one GPU of compute capability 9.0 or 10.0, bfloat16; not yet "
        "tested on a GPU",
        role="numerics",
    )
    deterministic: bool = option(
        False,
        "use only deterministic algorithms on CUDA, so that a run repeats bit for bit; attention and embedding can be "
        "slower. On a CPU runs repeat without it",
        role="numerics",
    )

    worth_interval: int = option(
        25,
        "signal 'worth': steps between measurements, whose time is not in time/step_ms",
        least=1,
        only_with="chrono_signal=worth",
        group="Signals",
    )
    worth_batches: int = option(
        2, "signal 'worth': batches of training text per measurement", least=1, only_with="chrono_signal=worth"
    )

    chrono: ChronoConfig = field(default_factory=ChronoConfig)

    def flat(self) -> dict[str, Any]:
        """All settings by key."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "chrono"}
        return own | {PREFIX + name: value for name, value in vars(self.chrono).items()}

    @property
    def schedule(self) -> list[tuple[str, int]]:
        """(dataset, first training step) of each phase."""
        return parse_schedule(self.data_schedule) if self.data_schedule else [(self.dataset, 0)]

    @property
    def measures_worth(self) -> bool:
        """Whether training measures the worth of the experts."""
        return self.chrono.coherence and self.chrono.signal == "worth"

    @property
    def own_tags(self) -> list[str]:
        """The tags in wandb_tags."""
        return [tag.strip() for tag in self.wandb_tags.split(",") if tag.strip()]

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step, over all ranks."""
        return self.gradient_accumulation_steps * self.batch_size * self.block_size

    def model_args(self, vocab_size: int) -> dict[str, Any]:
        """Arguments of GPTConfig."""
        names = [f.name for f in dataclasses.fields(GPTConfig) if hasattr(self, f.name)]
        return {name: getattr(self, name) for name in names} | {"vocab_size": vocab_size}


def keys() -> dict[str, Option]:
    """Every key of train.py with its declaration, in the order of --help."""
    return dict(options_of(Settings)) | dict(options_of(ChronoConfig, PREFIX))


def names_with_role(*roles: str) -> tuple[str, ...]:
    """The keys that have one of these roles."""
    return tuple(name for name, key in keys().items() if key.role in roles)


def help_text() -> str:
    """The text of train.py --help."""
    return cli.help_text(USAGE, keys())


def from_arguments(arguments: list[str]) -> Settings:
    """Settings from a command line. Raises UserError for a wrong key, type, value or combination."""
    return from_values(given(arguments))


def given(arguments: list[str]) -> dict[str, Any]:
    """The settings that a command line, its config files and its arm set. Raises UserError for a wrong setting.

    --arm wins over config files, but must agree with the other --key=value. An arm that a config file sets must agree
    with all other settings.
    """
    line = cli.parse(arguments, keys(), config_files=True)
    arm = line.values.get("arm", "")
    defines = ARMS.get(arm, {})
    check_arm(arm, defines | (line.options if "arm" in line.options else line.values))
    return _with_id(line.file_options | defines | line.options)


def _with_id(values: dict[str, Any]) -> dict[str, Any]:
    """The values with {id} in out_dir replaced. Raises UserError if the id is not known."""
    if ID not in values.get("out_dir", ""):
        return values
    run_id = os.environ.get("WANDB_RUN_ID")
    if not run_id:
        raise UserError(f"out_dir={values['out_dir']!r}: {ID} stands for WANDB_RUN_ID, which is not set")
    return values | {"out_dir": values["out_dir"].replace(ID, run_id)}


def from_values(values: dict[str, Any]) -> Settings:
    """Settings from checked values by key. Raises UserError for an invalid combination."""
    steps = {name.removeprefix(PREFIX): v for name, v in values.items() if name.startswith(PREFIX)}
    rest = {name: v for name, v in values.items() if not name.startswith(PREFIX)}
    # ChronoConfig checks this too, but its message does not have the prefix
    for step, needed in missing_steps(vars(ChronoConfig()) | steps):
        by_arm = f" (arm={rest['arm']!r} sets it)" if PREFIX + step in ARMS.get(rest.get("arm", ""), {}) else ""
        raise UserError(f"{PREFIX}{step}=True{by_arm} needs {PREFIX}{needed}=True")
    settings = Settings(**rest, chrono=ChronoConfig(**steps))
    if settings.chrono.steps_on() and settings.n_exp == 1:
        raise UserError(f"{PREFIX}{settings.chrono.steps_on()[0]}=True needs experts: set n_exp above 1")
    try:
        GPTConfig(**settings.model_args(vocab_size=1))
    except ValueError as e:
        raise UserError(str(e)) from None
    check_schedule(settings.dataset, settings.data_schedule)
    if settings.measures_worth and settings.top_k == settings.n_exp:
        raise UserError(
            f"{PREFIX}signal='worth' masks one expert at a time, and top_k={settings.top_k} needs all n_exp="
            f"{settings.n_exp} experts: set a lower top_k"
        )
    for tag in settings.own_tags:
        if len(tag) > MAX_TAG:
            raise UserError(f"wandb_tags: W&B accepts tags of up to {MAX_TAG} characters, not {len(tag)}: {tag!r}")
    check_arm(settings.arm, settings.flat())
    settings.arm = settings.arm or arm_of(settings.flat())
    return settings


def check_schedule(dataset: str, data_schedule: str) -> None:
    """Raises UserError unless a data_schedule is empty, or well-formed, begins with dataset and has distinct names."""
    if not data_schedule:
        return
    try:
        schedule = parse_schedule(data_schedule)
    except ValueError as e:
        raise UserError(f"data_schedule: {e}") from None
    if schedule[0][0] != dataset:
        raise UserError(
            f"data_schedule={data_schedule!r} begins with {schedule[0][0]!r}, and dataset={dataset!r}: they must be "
            "the same"
        )
    names: dict[str, str] = {}
    for name in dict(schedule):
        other = names.setdefault(domain(name), name)
        if other != name:
            raise UserError(f"data_schedule: {other} and {name} have one name in the logs, {domain(name)!r}")
        if not re.fullmatch(r"(?!L\d+$|train$|val$)[\w.-]{1,60}", domain(name), re.ASCII):
            raise UserError(
                f"data_schedule: {domain(name)!r} cannot be a name in the logs: use letters, digits, '_', '-' and '.', "
                "and not 'train', 'val' or 'L0'"
            )


def domain(dataset: str) -> str:
    """The name of a dataset in metrics: the last part of its path."""
    return Path(dataset).name
