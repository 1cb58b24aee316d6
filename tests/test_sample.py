"""sample.py on tiny runs: texts repeat from their seed, follow the trained model, and show no broken character."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import sample
import train
from chronomoe.options import options_of
from data.tokenizer import END_OF_TEXT, UNKNOWN, TiktokenCodec, byte_encoding, codec_for, encoding_for
from model import GPT, GPTConfig
from tests.helpers.models import build
from trainer.errors import UserError, run_script

ROOT = Path(__file__).parent.parent
BLOCK = 16
TINY = dict(
    **dict(n_layer=3, n_head=2, n_embd=16, n_exp=4, block_size=BLOCK, batch_size=4, gradient_accumulation_steps=1),
    **dict(max_iters=3, warmup_iters=1, learning_rate=1e-2, eval_interval=3, eval_iters=1, device="cpu", dropout=0.2),
    **dict(chrono_router=True, chrono_coherence=True, chrono_beta=True, chrono_k_max=10),
)
BYTES = {"tokenizer": "bytes", "vocab_size": 257}
LETTERS = list("\nabcdefgh é漢")
TEXT = "plain, h\u00e9t\u00e9rog\u00e8ne, \u6f22\u5b57, \U0001f600\U0001f468\u200d\U0001f469, \x00\n"


def write_dataset(folder, vocab_size, meta=None):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        rng.integers(0, vocab_size, 500).astype("<u2").tofile(folder / f"{split}.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size} | meta))
    return folder


def trained(folder, dataset):
    """A run of three steps in a folder, its weights then drawn so wide that texts differ."""
    assert train.main([f"--{k}={v}" for k, v in (TINY | {"dataset": dataset, "out_dir": folder}).items()]) == 0
    generator = torch.Generator().manual_seed(5)

    def widen(weights):
        for name, value in weights.items():
            if value.dim() > 1 and not name.startswith("router_state."):
                value.normal_(std=0.5, generator=generator)
        weights["router_state.beta_coeff"].normal_(std=10, generator=generator)

    return edited(folder, folder, widen)


def edited(folder, to, change):
    """A run in folder `to` with the weights in `folder` after change(weights)."""
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    change(saved["model"])
    to.mkdir(exist_ok=True)
    torch.save(saved, to / "ckpt.pt")
    return to


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory):
    """A run on bytes. Not to be written to."""
    folder = tmp_path_factory.mktemp("bytes")
    return trained(folder / "run", write_dataset(folder / "data", 257, BYTES))


@pytest.fixture
def sampled(capsys):
    """sampled(out_dir, *arguments, **keys) is what sample.py prints to stdout."""

    def text(out_dir, *arguments, **keys):
        keys = dict(out_dir=out_dir, num_samples=1, max_new_tokens=40, seed=1) | keys
        capsys.readouterr()
        assert sample.main([*arguments, *(f"--{key}={value}" for key, value in keys.items())]) == 0
        captured = capsys.readouterr()
        text.notes = captured.err
        return captured.out

    return text


def one_line(arguments):
    with pytest.raises(UserError) as error:
        sample.main(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def model_of(run_folder):
    saved = torch.load(run_folder / "ckpt.pt", weights_only=True)
    return sample.build(saved, run_folder).eval()


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, 5), (1.3, 1000), (0.8, 1)])
def test_the_stream_is_generates(temperature, top_k):
    model, _ = build()
    model.eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    prompt = torch.randint(64, (1, 5))
    n = 2 * model.config.block_size  # beyond it the window slides
    ids = list(sample.stream(model, prompt, n, temperature, top_k, torch.Generator().manual_seed(3)))
    generated = model.generate(prompt, n, temperature, top_k, torch.Generator().manual_seed(3))
    assert ids == generated[0, 5:].tolist()
    assert top_k == 1 or len(set(ids)) > 1


def test_one_seed_gives_one_text_and_another_seed_another(byte_run, sampled):
    texts = [sampled(byte_run, prompt="def ", num_samples=2, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    first, second = texts[0].split(f"\n{sample.SEPARATOR}\n")
    assert first.startswith("def ") and second.startswith("def ")
    assert first != second
    assert sampled(byte_run, prompt="def ").removesuffix("\n") == first


def test_top_k_1_is_greedy(byte_run, sampled):
    greedy = sampled(byte_run, prompt="def ", temperature=0)
    assert sampled(byte_run, prompt="def ", top_k=1, temperature=1.5) == greedy
    assert sampled(byte_run, prompt="def ", top_k="None") != greedy


def test_the_trained_beta_is_applied_and_beta_off_is_beta_0(byte_run, sampled, tmp_path):
    on = sampled(byte_run, prompt="def ")
    assert "beta: on" in sampled.notes
    off = sampled(byte_run, prompt="def ", beta="off")
    assert "beta: off" in sampled.notes
    assert on != off
    without = edited(byte_run, tmp_path / "without", lambda weights: weights["router_state.beta_coeff"].zero_())
    assert sampled(without, prompt="def ") == off
    assert "beta: none" in sampled.notes


def test_the_text_is_the_evaluated_models_without_dropout(byte_run, sampled):
    codec = codec_for(BYTES, "")
    ids = codec.encode("def ")
    generated = model_of(byte_run).generate(torch.tensor([ids]), 40, 0.8, 200, torch.Generator().manual_seed(1))
    assert sampled(byte_run, prompt="def ") == codec.decode(generated[0].tolist()) + "\n"


def test_a_long_prompt_keeps_its_end(byte_run, sampled):
    prompt = "something before " + "x" * (BLOCK - 4) + "def "
    whole = sampled(byte_run, prompt=prompt)
    assert whole.startswith(prompt)
    assert whole.removeprefix(prompt) == sampled(byte_run, prompt=prompt[-BLOCK:]).removeprefix(prompt[-BLOCK:])


def test_an_empty_prompt_is_a_texts_beginning(byte_run, sampled):
    assert END_OF_TEXT + sampled(byte_run) == sampled(byte_run, prompt=END_OF_TEXT)


def test_a_prompt_may_come_from_a_file(byte_run, sampled, tmp_path):
    (tmp_path / "prompt.txt").write_text(TEXT, encoding="utf-8")
    assert sampled(byte_run, start=f"FILE:{tmp_path / 'prompt.txt'}") == sampled(byte_run, start=TEXT)
    assert "no.txt" in one_line(["--prompt=FILE:no.txt"])


def test_a_config_file_sets_keys_and_the_command_line_wins(byte_run, sampled, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(f"import math\n_n = 2\nout_dir = {str(byte_run)!r}\nstart = 'a'\nnum_samples = _n\nseed = 1\n")
    assert sampled(byte_run, str(config), prompt="def ") == sampled(byte_run, prompt="def ")
    assert sample.given([str(config)])["num_samples"] == 2
    assert sample.given([str(config), "--prompt=b"])["start"] == "b"


def test_a_checkpoint_may_be_a_path(byte_run, sampled):
    text = sampled(byte_run, prompt="def ")
    for path in (byte_run / "ckpt.pt", byte_run):
        assert sampled("nowhere", init_from=path, prompt="def ") == text


def test_a_damaged_checkpoint_is_passed_over_and_told(byte_run, sampled, tmp_path):
    text = sampled(byte_run)
    shutil.copy(byte_run / "ckpt.pt", tmp_path / "ckpt_previous.pt")
    (tmp_path / "ckpt.pt").write_bytes((byte_run / "ckpt.pt").read_bytes()[:-3000])
    assert sampled(tmp_path) == text
    assert "is damaged" in sampled.notes


@pytest.mark.parametrize("kind", ["meta.json", "meta.pkl"])
def test_a_vocabulary_of_characters(kind, sampled, tmp_path):
    n = len(LETTERS)
    if kind == "meta.json":
        itos = dict(enumerate(LETTERS))
        data = write_dataset(tmp_path / "data", n, {"tokenizer": "characters", "characters": LETTERS})
    else:
        itos = dict(enumerate(reversed(LETTERS)))
        data = write_dataset(tmp_path / "data", n)
        meta = {"vocab_size": n, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
        (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    stoi = {c: i for i, c in itos.items()}
    folder = trained(tmp_path / "run", data)
    for prompt, first in (("bé漢", "bé漢"), ("", "\n")):
        idx = torch.tensor([[stoi[c] for c in first]])
        ids = model_of(folder).generate(idx, 40, 0.8, 200, torch.Generator().manual_seed(1))[0, len(first) :]
        assert sampled(folder, prompt=prompt) == prompt + "".join(itos[i] for i in ids.tolist()) + "\n"
    assert "'z'" in one_line([f"--out_dir={folder}", "--prompt=baz"])


def test_nanomoes_checkpoint(sampled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    golden = ROOT / "tests" / "golden"
    (tmp_path / "out").mkdir()
    shutil.copy(golden / "nanomoe_ckpt.pt", tmp_path / "out" / "ckpt.pt")
    assert "dataset 'x' is not there" in one_line([])
    letters = [chr(ord("A") + i) for i in range(32)]
    write_dataset(tmp_path / "x", 32, {"characters": letters})
    text = sampled("out", prompt="AB")
    assert text.startswith("AB") and set(text) <= {*letters, "\n"} and len(text) == 2 + 40 + 1

    def compiled(weights):
        for name in list(weights):
            weights[f"_orig_mod.{name}"] = weights.pop(name)

    assert sampled(edited(tmp_path / "out", tmp_path / "compiled", compiled), prompt="AB") == text


def test_no_character_is_shown_before_it_is_whole():
    rng = random.Random(7)
    text = "".join(rng.choices(TEXT, k=200))
    codec = codec_for(BYTES, "")
    ids = codec.encode(text)
    assert bytes(ids) == text.encode()
    shown = ""
    for n, piece in enumerate(codec.decode_stream(ids), start=1):
        shown += piece
        assert UNKNOWN not in piece
        assert shown == bytes(ids[:n]).decode(errors="ignore")  # all that is whole is there
        assert codec.decode(ids[:n]) == shown
    assert shown == text


def test_bytes_that_are_no_character_are_replaced():
    codec = codec_for(BYTES, "")
    assert codec.decode([0xFF, ord("a"), 0xC3, ord("b"), 0xC3, 0xA9]) == f"{UNKNOWN}a{UNKNOWN}b\u00e9"
    assert codec.decode([256, 300]) == END_OF_TEXT + UNKNOWN  # a vocabulary may be padded


def test_a_token_is_shown_when_it_comes(byte_run, monkeypatch):
    shown, terminal = [], io.BytesIO()

    def slow(*_):
        for c in b"abc":
            shown.append(terminal.getvalue())
            yield c

    monkeypatch.setattr(sample, "stream", slow)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    sample.main([f"--out_dir={byte_run}", "--prompt=\u00e9>", "--num_samples=1"])
    assert shown == [b"?>", b"?>a", b"?>ab"]


def test_ctrl_c_ends_with_130_and_no_traceback(byte_run, capsys, monkeypatch):
    def interrupted(*_):
        yield ord("a")
        os.kill(os.getpid(), signal.SIGINT)
        yield ord("b")

    monkeypatch.setattr(sample, "stream", interrupted)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={byte_run}"])
    with pytest.raises(SystemExit) as end:
        run_script(sample.main)
    captured = capsys.readouterr()
    assert end.value.code == 130
    assert captured.out.startswith("a") and "Traceback" not in captured.err


def test_gpt2(sampled, monkeypatch):
    asked = []
    tiny = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=8), torch.Generator().manual_seed(0))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or byte_encoding())
    monkeypatch.setattr(GPT, "from_pretrained", lambda name: asked.append(name) or tiny)
    assert sampled("nowhere", init_from="gpt2-medium", prompt="def ").startswith("def ")
    assert asked == ["gpt2", "gpt2-medium"]


def test_gpt2_without_transformers_or_network_is_one_line(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: byte_encoding())
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers" in one_line(["--init_from=gpt2"])

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert "TIKTOKEN_CACHE_DIR" in one_line(["--init_from=gpt2"])


def test_a_dataset_without_meta_file_is_gpt2s(monkeypatch):
    asked = []
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or byte_encoding())
    assert isinstance(codec_for({}, ""), TiktokenCodec)
    assert asked == ["gpt2"]


@pytest.mark.parametrize(
    "meta",
    [
        {"vocab_size": 9},
        {"tokenizer": "other"},
        {"tokenizer": ["bytes"]},
        {"characters": []},
        {"characters": 3},
        {"characters": [1, 2]},
        {"stoi": {"a": "b"}, "itos": {0: "a"}},
        {"stoi": [1], "itos": None},
    ],
)
def test_a_meta_file_without_vocabulary_is_one_line(meta):
    with pytest.raises(UserError, match=r"^the file describes no vocabulary: [^\n]+$"):
        codec_for(meta, "the file")


def test_an_encoding_of_another_name_is_refused():
    with pytest.raises(UserError, match="'bytes' or 'gpt2'"):
        encoding_for("gtp2")


def test_errors_are_one_line_that_says_what_would_be_right(byte_run, tmp_path):
    out = f"--out_dir={byte_run}"
    assert "nowhere" in one_line(["--out_dir=nowhere"])
    assert "did you mean prompt?" in one_line(["--promt=a"])
    assert "did you mean temperature?" in one_line(["--temprature=1"])
    assert "train.py" in one_line(["--n_layer=3"])
    assert "--key=value" in one_line(["--prompt"])
    assert "'on', 'off'" in one_line(["--beta=of"])
    assert "top_k" in one_line(["--top_k=0"])
    assert "gpt2-xl" in one_line(["--init_from=gtp2"])
    assert "--dataset" in one_line([out, "--dataset=nope"])
    assert "cpu" in one_line([out, "--device=nothing"])
    assert "temperature" in one_line([out, "--temperature=1e-300"])
    plain = write_dataset(tmp_path / "plain", 9)
    assert "GPT-2" in one_line([out, f"--dataset={plain}"])
    many = write_dataset(tmp_path / "many", 300, {"characters": [chr(1000 + i) for i in range(300)]})
    assert "300" in one_line([out, f"--dataset={many}"]) and "257" in one_line([out, f"--dataset={many}"])
    (tmp_path / "config.py").write_text("temprature = 1\n")
    assert "did you mean temperature?" in one_line([str(tmp_path / "config.py")])
    (tmp_path / "config.py").write_text("temperature = 1 / 0\n")
    assert "ZeroDivisionError" in one_line([str(tmp_path / "config.py")])
    misfit = edited(byte_run, tmp_path / "misfit", lambda weights: weights.pop("lm_head.weight"))
    assert "lm_head.weight" in one_line([f"--out_dir={misfit}"])


def test_a_mistake_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--out_dir=nowhere"])
    with pytest.raises(SystemExit) as end:
        run_script(sample.main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: there is no checkpoint in nowhere\n"


def test_help_lists_every_key(capsys):
    assert sample.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {key} = " in text for key in options_of(sample.SampleSettings))
