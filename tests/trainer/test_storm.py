"""A run that is killed at any instant and resumed is the same run: SIGKILL during steps, evaluations and saves."""

import random
import shutil
import signal
import time

import pytest

from tests.helpers import child, runs

# evaluations as long as the steps between them, checkpoints between evaluations, decisions of both kinds
STORM = dict(
    **dict(n_embd=64, max_iters=120, lr_decay_iters=120, eval_interval=8, eval_iters=25, log_interval=3),
    **dict(checkpoint_interval=6, chrono_eta=1e-2, chrono_k_max=1.0, chrono_window=20, chrono_unused_after=20),
    **dict(chrono_prune_phi=0.5, chrono_prune_min_tokens=100, chrono_prune_min_updates=5, chrono_alpha_slow=0.9),
    **dict(chrono_unused_tokens=1500, init_from="auto"),
)


def storm(keys, tmp_path, kills, seed):
    """Kill a run `kills` times, every third time while it writes a checkpoint, then finish it and compare.

    Returns the number of kills during the writing of a checkpoint.
    """
    dataset = runs.write_skewed_dataset(tmp_path / "data")  # the loss falls, so there are best checkpoints
    calm, out, log = tmp_path / "calm", tmp_path / "storm", tmp_path / "log"
    assert child.run(keys(calm, dataset=dataset, **STORM), log) == 0
    assert {d["action"] for d in runs.lines(calm / "decisions.jsonl")} == {"open", "withdrawn"}
    seconds = sum(line.get("time/step_ms", 0) for line in runs.metrics(calm)) / 1000
    draws, command = random.Random(seed), keys(out, dataset=dataset, **STORM)
    done = in_saves = 0
    while done < kills:
        log.unlink(missing_ok=True)
        process = child.start(command, log)
        partial = out / f"ckpt.pt.{process.pid}.tmp"
        if done % 3 == 2:
            child.wait_for(lambda p=process, f=partial: not p.is_alive() or f.exists())
        else:
            child.wait_for(lambda: log.exists() and "loop:" in log.read_text())
            time.sleep(draws.uniform(0, 4 * seconds / kills))
        if process.is_alive():
            assert child.stop(process, signal.SIGKILL) == -signal.SIGKILL
            done += 1
            in_saves += partial.exists()
        else:  # it ended before it was killed: start again
            assert child.finish(process) == 0
            assert_same(out, calm)
            shutil.rmtree(out)
    assert child.run(command, log) == 0
    assert_same(out, calm)
    assert not list(out.glob("*.tmp")) and runs.steps(out)[-1] == STORM["max_iters"]
    return in_saves


def assert_same(out, calm):
    runs.assert_same_run(out, calm)
    assert runs.differing_state(out, calm, "ckpt_best.pt") == set()


def test_a_run_killed_several_times_is_the_run_that_was_not_killed(keys, tmp_path):
    storm(keys, tmp_path, kills=5, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_twenty_times_is_the_run_that_was_not_killed(seed, keys, tmp_path):
    assert storm(keys, tmp_path, kills=20, seed=seed) >= 3
