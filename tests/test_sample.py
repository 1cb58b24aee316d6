"""sample.py on tiny runs: samples repeat from their seed, follow the trained model, and print whole characters."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import sys

import pytest
import tiktoken
import torch

import sample
import train
from data.tokenizer import END_OF_TEXT, UNKNOWN, TiktokenCodec, byte_encoding, codec_for, encoding_for
from model import GPT, GPTConfig
from tests.helpers.models import build
from tests.helpers.runs import ROOT, TINY, one_line, write_dataset
from trainer.errors import UserError, run_script
from trainer.weights import build_model

BLOCK = TINY["block_size"]
RUN = TINY | dict(max_iters=1, eval_iters=1, dropout=0.2, chrono_router=True, chrono_coherence=True, chrono_beta=True)
LETTERS = list("\nabcdefgh é漢")
TEXT = "plain, h\u00e9t\u00e9rog\u00e8ne, \u6f22\u5b57, \U0001f600\U0001f468\u200d\U0001f469, \x00\n"
ARGUMENTS = dict(num_samples=1, max_new_tokens=40, seed=1, device="cpu")


def dataset(folder, vocab_size, **meta):
    write_dataset(folder, vocab_size)
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size} | meta))
    return folder


def trained(folder, data):
    """A run of one step, with weights and beta replaced by random ones that are large enough for varied samples."""
    settings = RUN | {"dataset": data, "out_dir": folder, "chrono_k_max": 10}
    assert train.main([f"--{key}={value}" for key, value in settings.items()]) == 0
    generator = torch.Generator().manual_seed(5)

    def widen(weights):
        for name, value in weights.items():
            if value.dim() > 1 and not name.startswith("router_state."):
                value.normal_(std=0.5, generator=generator)
        weights["router_state.beta_coeff"].normal_(std=10, generator=generator)

    return edited(folder, folder, widen)


def edited(folder, to, change):
    """Save the run in `folder` to the folder `to` after change(weights)."""
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    change(saved["model"])
    to.mkdir(exist_ok=True)
    torch.save(saved, to / "ckpt.pt")
    return to


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory):
    """A run on bytes. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("bytes")
    return trained(folder / "run", dataset(folder / "data", 257, tokenizer="bytes"))


@pytest.fixture
def sampled(capsys):
    """sampled(out_dir, *arguments, **keys) returns what sample.py prints to stdout; sampled.notes is its stderr."""

    def text(out_dir, *arguments, **keys):
        capsys.readouterr()
        keys = ARGUMENTS | {"out_dir": out_dir} | keys
        assert sample.main([*arguments, *(f"--{key}={value}" for key, value in keys.items())]) == 0
        out, text.notes = capsys.readouterr()
        return out

    return text


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        sample.main(list(arguments))
    return one_line(error)


def generated(folder, prompt_ids):
    """40 ids that the model of a run generates after the prompt, with the default settings and seed 1."""
    model = build_model(torch.load(folder / "ckpt.pt", weights_only=True), "").eval()
    generator = torch.Generator().manual_seed(1)
    return model.generate(torch.tensor([prompt_ids]), 40, 0.8, 200, generator)[0, len(prompt_ids) :].tolist()


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (2.0, 2), (0.7, 5), (1.3, 1000), (0.8, 1), (0, None)])
def test_a_stream_samples_from_the_top_k_given_the_last_block_size_tokens(temperature, top_k):
    model = build()[0].eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    block, prompt = model.config.block_size, torch.randint(64, (1, 5))
    idx, generator = prompt, torch.Generator().manual_seed(3)
    for _ in range(2 * block):
        logits = model(idx[:, -block:])[0][0, -1]
        best = logits.argsort(descending=True)[:top_k]
        probabilities = torch.zeros_like(logits)
        probabilities[best] = (logits[best] / temperature).softmax(-1) if temperature else torch.eye(len(best))[0]
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        idx = torch.cat([idx, drawn[None]], dim=1)
    stream = model.stream(prompt, 2 * block, temperature, top_k, torch.Generator().manual_seed(3))
    assert [int(token) for token in stream] == idx[0, 5:].tolist()


def test_samples_follow_seed_top_k_and_temperature(byte_run, sampled):
    texts = [sampled(byte_run, prompt="def ", num_samples=2, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    first, second = texts[0].removesuffix("\n").split(f"\n{sample.SEPARATOR}\n")
    assert first.startswith("def ") and second.startswith("def ") and first != second
    assert sampled(byte_run, prompt="def ").removesuffix("\n") == first
    greedy = sampled(byte_run, prompt="def ", temperature=0)
    assert sampled(byte_run, prompt="def ", top_k=1, temperature=1.5) == greedy
    assert sampled(byte_run, prompt="def ", top_k="None") != greedy


def test_the_trained_beta_is_applied_and_beta_off_is_beta_0(byte_run, sampled, tmp_path):
    on, on_notes = sampled(byte_run, prompt="def "), sampled.notes
    off, off_notes = sampled(byte_run, prompt="def ", beta="off"), sampled.notes
    assert on != off and "beta: on" in on_notes and "beta: off" in off_notes
    without = edited(byte_run, tmp_path / "without", lambda weights: weights["router_state.beta_coeff"].zero_())
    assert sampled(without, prompt="def ") == off
    assert "beta: none" in sampled.notes


def test_a_sample_is_the_prompt_and_what_the_evaluated_model_generates(byte_run, sampled, tmp_path):
    codec = codec_for({"tokenizer": "bytes"}, "")
    ids = codec.encode("def ")  # dropout would change it
    assert sampled(byte_run, prompt="def ") == codec.decode(ids + generated(byte_run, ids)) + "\n"
    assert END_OF_TEXT + sampled(byte_run) == sampled(byte_run, prompt=END_OF_TEXT)  # an empty prompt begins a text
    (tmp_path / "prompt.txt").write_text(TEXT, encoding="utf-8")
    assert sampled(byte_run, start=f"FILE:{tmp_path / 'prompt.txt'}") == sampled(byte_run, start=TEXT)
    long = "something before " + "x" * (BLOCK - 4) + "def "
    end = sampled(byte_run, prompt=long[-BLOCK:]).removeprefix(long[-BLOCK:])
    assert sampled(byte_run, prompt=long) == long + end


def test_a_config_file_sets_keys_and_the_command_line_wins(byte_run, sampled, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("prompt = 'a'\nnum_samples = 2\n")
    assert sampled(byte_run, str(config), prompt="def ") == sampled(byte_run, prompt="def ")
    settings = [sample.from_arguments([str(config), *more]) for more in ([], ["--start=b"])]
    assert [(s.start, s.num_samples) for s in settings] == [("a", 2), ("b", 2)]


def test_a_checkpoint_may_be_a_path_and_a_damaged_one_is_skipped(byte_run, sampled, tmp_path):
    text = sampled(byte_run, prompt="def ")
    for path in (byte_run / "ckpt.pt", byte_run):
        assert sampled("nowhere", init_from=path, prompt="def ") == text
    shutil.copy(byte_run / "ckpt.pt", tmp_path / "ckpt_previous.pt")
    (tmp_path / "ckpt.pt").write_bytes((byte_run / "ckpt.pt").read_bytes()[:-3000])
    assert sampled(tmp_path, prompt="def ") == text
    assert "is damaged" in sampled.notes


@pytest.mark.parametrize("kind", ["meta.json", "meta.pkl"])
def test_a_vocabulary_of_characters(kind, sampled, tmp_path):
    letters = LETTERS if kind == "meta.json" else LETTERS[::-1]
    data = dataset(tmp_path / "data", len(letters), tokenizer="characters", characters=letters)
    if kind == "meta.pkl":
        (data / "meta.json").unlink()
        maps = {"itos": dict(enumerate(letters)), "stoi": {c: i for i, c in enumerate(letters)}}
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(letters)} | maps))
    folder = trained(tmp_path / "run", data)
    for prompt, first in (("bé漢", "bé漢"), ("", "\n")):
        ids = generated(folder, [letters.index(c) for c in first])
        assert sampled(folder, prompt=prompt) == prompt + "".join(letters[i] for i in ids) + "\n"
    assert "'z'" in refusal(f"--out_dir={folder}", "--prompt=baz")


def test_a_checkpoint_of_nanomoe_is_sampled(sampled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copy(ROOT / "tests" / "golden" / "nanomoe_ckpt.pt", tmp_path / "out" / "ckpt.pt")
    assert "there is no dataset 'x'" in refusal()
    dataset(tmp_path / "x", 32, characters=[chr(ord("A") + i) for i in range(32)])
    text = sampled("out", prompt="AB")
    assert text.startswith("AB") and len(text) == 2 + 40 + 1

    def compiled(weights):
        for name in list(weights):
            weights[f"_orig_mod.{name}"] = weights.pop(name)

    assert sampled(edited(tmp_path / "out", tmp_path / "compiled", compiled), prompt="AB") == text


def test_a_character_is_printed_when_its_last_byte_comes():
    codec, text, shown = codec_for({"tokenizer": "bytes"}, ""), "".join(random.Random(7).choices(TEXT, k=200)), ""
    ids = codec.encode(text)
    assert bytes(ids) == text.encode()
    for n, piece in enumerate(codec.decode_stream(ids), start=1):
        shown += piece
        assert shown == codec.decode(ids[:n]) == bytes(ids[:n]).decode(errors="ignore")
    assert shown == text
    assert codec.decode([0xFF, ord("a"), 0xC3, ord("b"), 0xC3, 0xA9]) == f"{UNKNOWN}a{UNKNOWN}b\u00e9"
    assert codec.decode([256, 300]) == END_OF_TEXT + UNKNOWN  # a vocabulary may be padded


def test_a_token_is_printed_when_it_is_sampled(byte_run, monkeypatch):
    shown, terminal = [], io.BytesIO()

    def slow(*_):
        for c in b"abc":
            shown.append(terminal.getvalue())
            yield torch.tensor([[c]])

    monkeypatch.setattr(GPT, "stream", slow)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    sample.main([f"--out_dir={byte_run}", "--prompt=\u00e9>", "--num_samples=1"])
    assert shown == [b"?>", b"?>a", b"?>ab"]


def test_ctrl_c_ends_with_130_and_no_traceback(byte_run, capsys, monkeypatch):
    def interrupted(*_):
        yield torch.tensor([[ord("a")]])
        os.kill(os.getpid(), signal.SIGINT)
        yield torch.tensor([[ord("b")]])

    monkeypatch.setattr(GPT, "stream", interrupted)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={byte_run}"])
    with pytest.raises(SystemExit) as end:
        run_script(sample.main)
    out, err = capsys.readouterr()
    assert end.value.code == 130 and out.startswith("a") and "Traceback" not in err


def test_gpt2_is_loaded_by_its_name_with_its_tokenizer(sampled, monkeypatch):
    asked = []
    tiny = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=8), torch.Generator().manual_seed(0))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or byte_encoding())
    monkeypatch.setattr(GPT, "from_pretrained", lambda name: asked.append(name) or tiny)
    assert sampled("nowhere", init_from="gpt2-medium", prompt="def ").startswith("def ")
    assert asked == ["gpt2", "gpt2-medium"]
    assert isinstance(codec_for({}, ""), TiktokenCodec)  # of a dataset without a meta file
    assert asked == ["gpt2", "gpt2-medium", "gpt2"]


def test_gpt2_without_transformers_or_network_is_one_line(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: byte_encoding())
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers" in refusal("--init_from=gpt2")

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert "TIKTOKEN_CACHE_DIR" in refusal("--init_from=gpt2")


def test_a_meta_file_without_vocabulary_is_one_line():
    metas = [dict(vocab_size=9), dict(tokenizer="other"), dict(tokenizer=["bytes"]), dict(characters=[])]
    metas += [dict(characters=3), dict(characters=[1, 2]), dict(stoi={"a": "b"}, itos={0: "a"}), dict(stoi=[1], itos=0)]
    for meta in metas:
        with pytest.raises(UserError, match=r"^the file ") as error:
            codec_for(meta, "the file")
        one_line(error)
    with pytest.raises(UserError, match="'bytes' or 'gpt2'"):
        encoding_for("gtp2")


def test_a_model_a_dataset_or_a_device_that_does_not_fit_is_one_line(byte_run, tmp_path):
    out = f"--out_dir={byte_run}"
    assert "--dataset" in refusal(out, "--dataset=nope")
    assert "--device=cpu" in refusal(out, "--device=nothing")
    assert "temperature=1e-300, are not finite" in refusal(out, "--temperature=1e-300")
    plain = write_dataset(tmp_path / "plain", 9)
    (plain / "meta.json").unlink()
    assert "the model has 257 tokens, fewer than GPT-2" in refusal(out, f"--dataset={plain}")
    many = dataset(tmp_path / "many", 300, characters=[chr(1000 + i) for i in range(300)])
    assert "300 tokens, the model 257" in refusal(out, f"--dataset={many}")
    misfit = edited(byte_run, tmp_path / "misfit", lambda weights: weights.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(f"--out_dir={misfit}")
    nan = edited(byte_run, tmp_path / "nan", lambda weights: weights["lm_head.weight"].fill_(torch.nan))
    assert "are not finite" in refusal(f"--out_dir={nan}")
