"""The loop inside Hugging Face's Trainer."""

import subprocess
import sys

import pytest
import torch

from chronomoe import ChronoConfig
from tests.helpers.hub import build
from tests.helpers.runs import ROOT

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from chronomoe.callback import ChronoCallback  # noqa: E402

CONFIG = ChronoConfig(
    router=True, coherence=True, beta=True, bridge=True, lifecycle=True, eta=0.05, k_max=1.0, ramp="1@0", unused_after=1
)


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        ids = torch.randint(2, 64, (10,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trainer_of(folder, config=CONFIG, steps=6, model=None, **changes):
    options = dict(
        max_steps=steps, save_steps=3, logging_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2, seed=5,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **options | changes)
    trainer = transformers.Trainer(model or build("olmoe"), arguments, train_dataset=Texts(), eval_dataset=Texts())
    callback = ChronoCallback(trainer, config)
    trainer.add_callback(callback)
    return trainer, callback


@pytest.mark.parametrize("family", ["gpt_oss", "olmoe"])
def test_resume_from_a_checkpoint_is_exact(tmp_path, family):
    whole, callback = trainer_of(tmp_path / "a", model=build(family))
    whole.train()
    assert callback.handle.loop.coherence.step == 6
    checkpoint = tmp_path / "a" / "checkpoint-3"
    fresh = build(family, seed=9)
    if family == "olmoe":  # Trainer does not read back its experts: issue 48805 of transformers
        fresh = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed, again = trainer_of(tmp_path / "b", model=fresh)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert again.handle.loop.last is not None
    state = resumed.model.state_dict()
    assert sum(name.startswith("chrono.") for name in state) > 15
    assert state["chrono.router_state.beta_coeff"].abs().sum() > 0
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert whole.state.log_history[-2]["loss"] == resumed.state.log_history[-2]["loss"]


def test_the_summary_is_logged_beside_the_loss(tmp_path):
    trainer, callback = trainer_of(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="no", steps=4)
    trainer.train()
    losses = [line["step"] for line in trainer.state.log_history if "loss" in line]
    ours = [line for line in trainer.state.log_history if "chrono/routing/js" in line]
    assert losses == [line["step"] for line in ours] == [2, 4]
    names = {name for name in ours[-1] if name.startswith("chrono/")}
    assert {"chrono/coherence/phi_min", "chrono/beta/strength", "chrono/lifecycle/candidates"} < names
    assert len(names) < 25 and not any("L0" in name for name in names)
    assert ours[-1]["chrono/beta/spread"] > 0
    assert (
        callback.handle.loop.coherence.step == 4 and callback.handle.loop.last.tokens == 40
    )  # evaluations add nothing


def test_a_skipped_optimizer_step_is_no_observation(tmp_path, monkeypatch):
    trainer, callback = trainer_of(tmp_path, save_strategy="no", steps=3)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", True)
    trainer.train()
    coherence = callback.handle.loop.coherence
    assert coherence.step == 3 and coherence.update_count.sum() == 0


def test_the_scale_of_float16_losses_is_removed(tmp_path):
    config = ChronoConfig(router=True, coherence=True, beta=True, signal="first_order")
    trainer, callback = trainer_of(tmp_path, config)
    trainer.accelerator.scaler = type("Scaler", (), {"get_scale": lambda self: 512.0})()
    callback.on_pre_optimizer_step(None, None, None)
    assert callback._loss_scale == 512
    found = []
    callback.handle.step = lambda *args: found.append(args)
    callback.on_optimizer_step(None, None, None)
    assert found == [(None, torch.tensor(512.0))]


def test_data_parallel_is_refused(tmp_path):
    trainer, callback = trainer_of(tmp_path)
    callback.handle.detach()
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="copies the model to 2 devices: start one process per device"):
        ChronoCallback(trainer, CONFIG)


def test_the_package_needs_torch_alone_and_the_callback_says_what_it_needs():
    missing = "import sys; sys.modules.update(dict.fromkeys(('transformers', 'accelerate', 'safetensors')))"
    code = f"{missing}; import chronomoe; print('imported'); import chronomoe.callback"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "imported\n"
    assert done.stderr.splitlines()[-1].endswith("pip install transformers accelerate")
