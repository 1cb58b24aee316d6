"""Settings that cannot fit into memory are refused before anything is allocated; running out of it is one line."""

import dataclasses

import numpy as np
import pytest
import torch

import train
from model import GPT, GPTConfig
from tests.helpers.runs import TINY, arguments, error_of
from trainer import memory
from trainer.memory import host_memory, in_words, least_memory, num_parameters, one_line_out_of_memory
from trainer.settings import from_values
from trainer.step import TrainingStep

SHAPES = [
    dict(n_exp=1, bias=True),
    dict(n_exp=1, n_layer=1, max_iters=0),
    dict(n_exp=5, top_k=1, stride=1),
    dict(n_exp=3, top_k=3, stride=2, n_layer=5, bias=True, use_noisy_top_k=True),
    dict(n_exp=4, stride=4, block_size=8, batch_size=9, eval_only=True),
]
# settings that need too much, and parts of the message
TOO_LARGE = [
    (dict(batch_size=10**9), "batch_size=1000000000 needs at least", "for the activations of a micro-batch"),
    (
        dict(n_embd=10**6),
        "n_embd=1000000 needs at least 1.19",
        "PiB for weights, gradients and the optimizer's averages",
    ),
    (dict(n_exp=10**9), "n_exp=1000000000 needs"),
    (dict(n_layer=10**12), "n_layer=1000000000000 needs"),
    (dict(eval_iters=10**15), "eval_iters=1000000000000000 needs at least 3.55 PiB for the losses of an evaluation"),
    (dict(batch_size=10**9, eval_only=True), "batch_size=1000000000 needs"),
    (dict(n_embd=2**63 - 2), f"n_embd={2**63 - 2} needs", "EiB"),
]


def settings(**changes):
    return from_values(TINY | changes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_estimate_is_the_number_of_parameters_and_less_than_what_backward_keeps(shape):
    s = settings(**shape)
    model = GPT(GPTConfig(**s.model_args(61)))
    assert num_parameters(s, 61) == model.get_num_params(non_embedding=False)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x

    idx = torch.randint(61, (s.batch_size, s.block_size))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(idx, idx, return_logits=False)
    found = sum(size for pointer, (size, _) in kept.items() if pointer not in weights)
    needs = least_memory(s, 61)
    trains = s.max_iters > 0 and not s.eval_only
    assert (found / 4 if trains else 0) < needs[memory.ACTIVATIONS] < found
    half = least_memory(dataclasses.replace(s, dtype="bfloat16"), 61)
    assert 2 * half[memory.ACTIVATIONS] == needs[memory.ACTIVATIONS]
    assert (
        needs[memory.TRAINING]
        == (4 if trains else 1) * needs[memory.WEIGHTS]
        == (16 if trains else 4) * sum(p.numel() for p in model.parameters())
    )


@pytest.mark.parametrize("mistake", TOO_LARGE, ids=lambda m: str(m[0]))
def test_a_setting_that_needs_too_much_memory_is_named_and_leaves_no_folder(mistake, start, out):
    changes, *expected = mistake
    message = error_of(start, out, **changes)
    assert all(part in message for part in (*expected, f"; this machine has {in_words(host_memory())}")), message
    assert not out.exists()


def test_on_cuda_the_limit_is_the_gpus_memory_and_the_weights_must_fit_the_host(monkeypatch):
    gpu = type("Properties", (), {"total_memory": 3 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    device, s = torch.device("cuda:0"), settings(n_embd=2048)
    message = error_of(memory.check_memory, s, 61, device)
    assert message.startswith("n_embd=2048 needs at least") and message.endswith("cuda:0 has 3 GiB")
    gpu.total_memory = 30 << 30
    memory.check_memory(s, 61, device)
    monkeypatch.setattr(memory, "host_memory", lambda: 1 << 30)
    assert error_of(memory.check_memory, s, 61, device).endswith("for weights; this machine has 1 GiB")


def test_the_default_settings_name_no_key(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 1 << 20)
    message = error_of(memory.check_memory, from_values({}), 50304, torch.device("cpu"))
    assert message.startswith("the model needs at least") and message.endswith("this machine has 1 MiB")


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "1048576"}, 1 << 20),  # in a container
        ("0::/a/b\n", {"memory.max": "max", "a/memory.max": "1048576", "a/b/memory.max": "max"}, 1 << 20),
        ("0::/gone\n", {"memory.max": "1048576"}, 1 << 20),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "2097152"}, 2 << 20),
        ("4:cpu:/a\n", {"a/memory.max": "1048576"}, 8 << 30),
        (None, {"memory.max": "1048576"}, 8 << 30),
    ],
)
def test_the_memory_of_the_host_is_the_least_of_its_own_and_the_limits_plus_swap(
    group, files, expected, tmp_path, monkeypatch
):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal:  {8 << 20} kB\nMemFree:  1 kB\nSwapTotal:  2 kB\n")
    if group is not None:
        (proc / "self" / "cgroup").write_text(group)
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(content + "\n")
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUPS", groups)
    assert host_memory() == expected + 2048


def fail(e):
    raise e


@pytest.mark.parametrize(
    ("allocate", "expected"),
    [
        (lambda: torch.empty(10**15), "out of memory, 3.55 PiB more were needed: lower batch_size"),
        (lambda: np.arange(10**15), "out of memory: lower batch_size"),
        (lambda: fail(MemoryError()), "out of memory: lower batch_size"),
        (
            lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")),
            "CUDA out of memory: lower batch_size",
        ),
    ],
)
def test_running_out_of_memory_is_one_line_that_names_the_settings_to_lower(allocate, expected):
    with one_line_out_of_memory():
        pass
    message = error_of(one_line_out_of_memory()(allocate))
    assert message.startswith(expected) and "gradient_accumulation_steps" in message and "n_embd" in message
    with pytest.raises(RuntimeError, match="another"), one_line_out_of_memory():
        raise RuntimeError("another error")


def test_after_a_first_step_that_ran_out_of_memory_the_corrected_command_starts(start, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", lambda *_, **__: torch.empty(10**15))
        assert error_of(start, out, batch_size=8).startswith("out of memory")
    assert (out / "metrics.jsonl").exists()  # of step 0, which has no training
    assert start(out) == 0
    assert "holds a run already" in error_of(start, out)
    (out / "ckpt.pt").unlink()
    assert "holds a run already" in error_of(train.main, arguments(TINY | {"out_dir": out}))
