"""sample.py on tiny runs: samples repeat from their seed, follow the trained model, and print whole characters."""

import io
import json
import os
import pickle
import random
import shutil
import sys

import pytest
import tiktoken
import torch

import sample
import train
from data.tokenizer import END_OF_TEXT, UNKNOWN, TiktokenCodec, byte_encoding, codec_for, encoding_for
from model import GPT, GPTConfig
from tests.helpers.models import build
from tests.helpers.runs import NANOMOE, TINY, arguments, checkpoint, error_of, write_dataset
from trainer.weights import build_model

BLOCK = TINY["block_size"]
RUN = TINY | dict(max_iters=1, eval_iters=1, dropout=0.2, chrono_k_max=10, arm="on")
RUN |= dict(chrono_router=True, chrono_coherence=True)
LETTERS = list("\nabcdefgh é漢ABCDEFGHIJKLMNOPQRST")
TEXT = "plain, h\u00e9t\u00e9rog\u00e8ne, \u6f22\u5b57, \U0001f600\U0001f468\u200d\U0001f469, \x00\n"
BYTES = codec_for({"tokenizer": "bytes"}, "")
DEFAULTS = dict(prompt="def ", num_samples=1, max_new_tokens=40, seed=1, device="cpu")


def dataset(folder, vocab_size, **meta):
    write_dataset(folder, vocab_size)
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size} | meta))
    return folder


def copied(folder, to, weights):
    """Save the run in `folder` with these weights to the folder `to`."""
    saved = checkpoint(folder) | {"model": weights}
    to.mkdir(exist_ok=True)
    torch.save(saved, to / "ckpt.pt")
    return to


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory):
    """A run on bytes, with random weights and beta that are large enough for varied samples. Do not write to it."""
    folder = tmp_path_factory.mktemp("bytes")
    run, data = folder / "run", dataset(folder / "data", 257, tokenizer="bytes")
    assert train.main(arguments(RUN | dict(dataset=data, out_dir=run))) == 0
    weights, generator = checkpoint(run)["model"], torch.Generator().manual_seed(5)
    for name, value in weights.items():
        if value.dim() > 1 and not name.startswith("router_state."):
            value.normal_(std=0.5, generator=generator)
    weights["router_state.beta_coeff"].normal_(std=10, generator=generator)
    return copied(run, run, weights)


@pytest.fixture
def sampled(capsys):
    """sampled(out_dir, *files, **keys) returns what sample.py prints to stdout; sampled.notes is its stderr."""

    def text(out_dir, *files, **keys):
        capsys.readouterr()
        assert sample.main([*files, *arguments(DEFAULTS | {"out_dir": out_dir} | keys)]) == 0
        out, text.notes = capsys.readouterr()
        return out

    return text


def generated(folder, prompt_ids):
    """40 ids that the model of a run generates after the prompt, with the default settings and seed 1."""
    model = build_model(checkpoint(folder), "").eval()
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
    texts = [sampled(byte_run, num_samples=2, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    first, second = texts[0].removesuffix("\n").split(f"\n{sample.SEPARATOR}\n")
    assert first.startswith("def ") and second.startswith("def ") and first != second
    greedy = sampled(byte_run, temperature=0)
    assert sampled(byte_run, top_k=1, temperature=1.5) == greedy != sampled(byte_run, top_k="None")


def test_the_trained_beta_is_applied_and_beta_off_is_beta_0(byte_run, sampled, tmp_path):
    on, on_notes = sampled(byte_run), sampled.notes
    off, off_notes = sampled(byte_run, beta="off"), sampled.notes
    assert on != off and "beta: on" in on_notes and "beta: off" in off_notes
    weights = checkpoint(byte_run)["model"]
    weights["router_state.beta_coeff"].zero_()
    assert sampled(copied(byte_run, tmp_path / "without", weights)) == off and "beta: none" in sampled.notes


def test_a_sample_is_the_prompt_and_what_the_evaluated_model_generates(byte_run, sampled, tmp_path):
    ids = BYTES.encode("def ")
    text = BYTES.decode(ids + generated(byte_run, ids)) + "\n"  # dropout would change it
    assert sampled(byte_run) == sampled("nowhere", init_from=byte_run / "ckpt.pt") == text
    assert END_OF_TEXT + sampled(byte_run, prompt="") == sampled(byte_run, prompt=END_OF_TEXT)  # each begins a text
    (tmp_path / "prompt.txt").write_text(TEXT, encoding="utf-8")
    assert sampled(byte_run, prompt=f"FILE:{tmp_path / 'prompt.txt'}") == sampled(byte_run, prompt=TEXT)
    long = "something before " + "x" * (BLOCK - 4) + "def "
    end = sampled(byte_run, prompt=long[-BLOCK:]).removeprefix(long[-BLOCK:])
    assert sampled(byte_run, prompt=long) == long + end
    (tmp_path / "config.py").write_text("prompt = 'a'\nnum_samples = 2\n")
    s = sample.from_arguments([str(tmp_path / "config.py")])
    assert (s.start, s.num_samples) == ("a", 2) and sampled(byte_run, str(tmp_path / "config.py")) == text
    shutil.copy(byte_run / "ckpt.pt", tmp_path / "ckpt_previous.pt")
    (tmp_path / "ckpt.pt").write_bytes((byte_run / "ckpt.pt").read_bytes()[:-3000])
    assert sampled(tmp_path) == text and "is damaged" in sampled.notes


@pytest.mark.parametrize("kind", ["meta.json", "meta.pkl"])
def test_a_checkpoint_of_nanomoe_is_sampled_with_a_vocabulary_of_characters(kind, sampled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the checkpoint names the dataset x
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(NANOMOE, out / "ckpt.pt")
    of_compiled_model = {f"_orig_mod.{name}": value for name, value in checkpoint(out)["model"].items()}
    compiled = copied(out, tmp_path / "compiled", of_compiled_model)
    assert "there is no dataset 'x'" in error_of(sample.main, [])
    assert "there is no dataset 'xxx" in error_of(sample.main, ["--dataset=" + "x" * 300])
    letters = LETTERS if kind == "meta.json" else LETTERS[::-1]
    data = dataset(tmp_path / "x", len(letters), tokenizer="characters", characters=letters)
    if kind == "meta.pkl":
        (data / "meta.json").unlink()
        maps = {"itos": dict(enumerate(letters)), "stoi": {c: i for i, c in enumerate(letters)}}
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(letters)} | maps))
    for prompt, first in (("bé漢", "bé漢"), ("", "\n")):
        ids = generated(out, [letters.index(c) for c in first])
        text = prompt + "".join(letters[i] for i in ids) + "\n"
        assert sampled(out, prompt=prompt) == sampled(compiled, prompt=prompt) == text
    assert "'z'" in error_of(sample.main, ["--prompt=baz"])


def test_a_character_is_decoded_when_its_last_byte_comes():
    text, shown = "".join(random.Random(7).choices(TEXT, k=200)), ""
    ids = BYTES.encode(text)
    assert bytes(ids) == text.encode()
    for n, piece in enumerate(BYTES.decode_stream(ids), start=1):
        shown += piece
        assert shown == BYTES.decode(ids[:n]) == bytes(ids[:n]).decode(errors="ignore")
    assert BYTES.decode([0xFF, ord("a"), 0xC3, ord("b"), 0xC3, 0xA9]) == f"{UNKNOWN}a{UNKNOWN}b\u00e9"
    assert BYTES.decode([256, 300]) == END_OF_TEXT + UNKNOWN  # a vocabulary may be padded


def test_a_token_is_printed_when_it_is_sampled_and_ctrl_c_ends_with_130(byte_run, monkeypatch):
    shown, terminal = [], io.BytesIO()

    def slow(*_):
        for c in b"abc":
            shown.append(terminal.getvalue())
            yield torch.tensor([[c]])
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT, "stream", slow)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    assert sample.main([f"--out_dir={byte_run}", "--prompt=\u00e9>"]) == 130
    assert shown == [b"?>", b"?>a", b"?>ab"]


def test_gpt2_is_loaded_by_its_name_with_its_tokenizer(sampled, monkeypatch):
    asked = []
    tiny = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=8), torch.Generator().manual_seed(0))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or byte_encoding())
    monkeypatch.setattr(GPT, "from_pretrained", lambda name: asked.append(name) or tiny)
    assert sampled("nowhere", init_from="gpt2-medium").startswith("def ")
    assert asked == ["gpt2", "gpt2-medium"]
    assert isinstance(codec_for({}, ""), TiktokenCodec)  # of a dataset without a meta file
    assert asked == ["gpt2", "gpt2-medium", "gpt2"]
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)  # as without a network
    assert "TIKTOKEN_CACHE_DIR" in error_of(sample.main, ["--init_from=gpt2"])


@pytest.mark.parametrize(
    "meta",
    [
        *(dict(vocab_size=9), dict(tokenizer="other"), dict(tokenizer=["bytes"]), dict(characters=[])),
        *(dict(characters=3), dict(characters=[1, 2]), dict(stoi={"a": "b"}, itos={0: "a"}), dict(stoi=[1], itos=0)),
    ],
)
def test_a_meta_file_without_vocabulary_is_one_line(meta):
    assert error_of(codec_for, meta, "the file").startswith("the file ")


def test_what_does_not_fit_is_one_line(byte_run, tmp_path):
    assert "'bytes' or 'gpt2'" in error_of(encoding_for, "gtp2")
    plain = write_dataset(tmp_path / "plain", 9)
    (plain / "meta.json").unlink()
    many = dataset(tmp_path / "many", 300, characters=[chr(1000 + i) for i in range(300)])
    weights = checkpoint(byte_run)["model"]
    output = weights.pop("lm_head.weight")
    misfit = copied(byte_run, tmp_path / "misfit", weights)
    nan = copied(byte_run, tmp_path / "nan", weights | {"lm_head.weight": output * torch.nan})
    os.mkfifo(pipe := tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    for folder, argument, message in [
        (byte_run, "--dataset=nope", "--dataset"),
        (byte_run, f"--init_from={pipe}", "pipe: it is not a regular file"),
        (byte_run, "--explore=.", "cannot write .: it is not a file"),
        (byte_run, f"--explore={tmp_path}", "Is a directory"),
        (tmp_path / "empty", "", "there is no checkpoint in"),
        (tmp_path / "file", "", "Not a directory"),
        (byte_run, "--device=nothing", "--device=cpu"),
        (byte_run, "--temperature=1e-300", "temperature=1e-300, are not finite"),
        (byte_run, f"--dataset={plain}", "the model has 257 tokens, fewer than GPT-2"),
        (byte_run, f"--dataset={many}", "300 tokens, the model 257"),
        (misfit, "", "lm_head.weight"),
        (nan, "", "are not finite"),
    ]:
        assert message in error_of(sample.main, [f"--out_dir={folder}", *argument.split()])


def test_running_out_of_memory_is_one_line(byte_run, monkeypatch):
    monkeypatch.setattr(GPT, "stream", lambda *_: torch.empty(10**15))
    assert error_of(sample.main, [f"--out_dir={byte_run}"]).endswith("use a smaller model, or --device=cpu")
