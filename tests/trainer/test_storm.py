"""Killed at any instant, a run that is resumed is the same run: SIGKILL during steps, evaluations and saves."""

import functools
import random
import shutil
import time

import pytest

from tests.helpers import child
from tests.helpers.runs import ALL_ON, NOISY, TINY, differing_state, lines, metrics, write_dataset

# Evaluations as long as the steps between them, checkpoints between them, candidates that open and are withdrawn; every
# source of chance: dropout, router noise, accumulation.
STEPS = 120
STORM = TINY | ALL_ON | NOISY | dict(
    **dict(n_embd=64, max_iters=STEPS, lr_decay_iters=STEPS, eval_interval=8, eval_iters=25, log_interval=3),
    **dict(checkpoint_interval=6, chrono_eta=1e-2, chrono_k_max=1.0, chrono_window=20, chrono_unused_after=20),
    **dict(chrono_prune_phi=0.5, chrono_prune_min_tokens=100, chrono_prune_min_updates=5, chrono_alpha_slow=0.9),
    **dict(chrono_unused_tokens=1500),
)  # fmt: skip


def arguments(out, dataset, **changes):
    keys = STORM | {"out_dir": out, "dataset": dataset, "init_from": "auto"} | changes
    return [f"--{key}={value}" for key, value in keys.items()]


def storm(tmp_path, kills, seed):
    """Kill a run `kills` times, every third time as soon as a checkpoint is being written; end it; compare.

    Returns how many kills fell into the writing of a checkpoint.
    """
    dataset = write_dataset(tmp_path / "data", 8)  # 8 of 61 tokens: the loss falls, and there is a best
    (dataset / "meta.json").write_text('{"vocab_size": 61}')
    calm, out, log = tmp_path / "calm", tmp_path / "storm", tmp_path / "storm.log"
    assert child.finish(child.start(arguments(calm, dataset), tmp_path / "calm.log")) == 0
    steps_take = sum(line.get("time/step_ms", 0) for line in metrics(calm)) / 1000
    chance = random.Random(seed)
    done = in_saves = 0
    while done < kills:
        log.unlink(missing_ok=True)
        process = child.start(arguments(out, dataset), log)
        partial = out / f"ckpt.pt.{process.pid}.tmp"
        if done % 3 == 2:
            child.wait_for(functools.partial(ended_or_there, process, partial))
        else:
            child.wait_for(functools.partial(has_begun, log))
            time.sleep(chance.uniform(0, 4 * steps_take / kills))
        if not process.is_alive():  # it came to its end before it could be killed: from the start again
            assert child.finish(process) == 0
            assert_same(out, calm)
            shutil.rmtree(out)
            continue
        process.kill()
        assert child.finish(process) == -9
        done += 1
        in_saves += partial.exists()
    assert child.finish(child.start(arguments(out, dataset), log)) == 0
    assert_same(out, calm)
    assert not list(out.glob("*.tmp"))
    steps = [line["step"] for line in metrics(out)]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    return in_saves


def ended_or_there(process, path):
    return not process.is_alive() or path.exists()


def has_begun(log):
    return log.exists() and "loop:" in log.read_text()


def assert_same(out, calm):
    assert differing_state(out, calm) == set()
    assert differing_state(out, calm, "ckpt_best.pt") == set()
    assert metrics(out, timeless=True) == metrics(calm, timeless=True)
    decisions = lines(calm / "decisions.jsonl")
    assert {d["action"] for d in decisions} == {"open", "withdrawn"}
    assert lines(out / "decisions.jsonl") == decisions


def test_a_run_killed_again_and_again_is_the_run_that_was_not(tmp_path):
    storm(tmp_path, kills=5, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_twenty_kills(seed, tmp_path, capsys):
    in_saves = storm(tmp_path, kills=20, seed=seed)
    with capsys.disabled():
        print(f"\n20 kills, {in_saves} of them in the writing of a checkpoint: state and logs are the same")
    assert in_saves >= 3
