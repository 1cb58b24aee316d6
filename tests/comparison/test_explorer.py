"""The routing explorer: its data against the model, and its page in a browser."""

import json
import re
import shutil
from contextlib import nullcontext

import pytest
import torch

from comparison import explorer
from data.tokenizer import CharacterCodec
from tests.helpers.models import SHAPE, build, chrono, record_routers, tokens
from tests.helpers.runs import error_of

CODEC = CharacterCodec.from_list([*"<&\n\t", *map(chr, range(0x100, 0x100 + SHAPE["vocab_size"] - 4))])


@pytest.fixture(scope="module")
def model():
    return build(chrono(), beta=1.0)[0].eval()


def explored(model):
    return explorer.explore(model, CODEC, list(tokens(3, batch=2)[0]), nullcontext)


def test_losses_and_routing_are_those_of_the_model_with_beta_and_without(model):
    idx, _ = tokens(3, batch=2)
    before = model.router_state.beta_coeff.clone()
    data = explored(model)
    assert torch.equal(model.router_state.beta_coeff, before) and before.any()
    for setting in ("on", "off"):
        calls = record_routers(model)
        loss = model(idx[1:, :-1], idx[1:, 1:])[1].item()
        found, rows = data["beta"][setting][1], len(idx[1]) - 1
        assert found["loss"][0] is None and sum(found["loss"][1:]) / rows == pytest.approx(loss, abs=1e-3)
        for (_, routing), layer in zip(calls, found["layers"], strict=True):
            probabilities = [z.softmax(-1) for z in (routing.z_clean, routing.z_biased)]
            for i in range(rows):
                experts = [row[0] for row in layer["tokens"][i]]
                assert experts[: data["topK"]] == routing.experts[i].tolist()
                for k, (e, *values) in enumerate(layer["tokens"][i]):
                    gate = routing.gates[i, k].item() if k < data["topK"] else 0
                    assert values == pytest.approx([*(p[i, e].item() for p in probabilities), gate], abs=6e-4)
                clean = set(routing.z_clean[i].topk(data["topK"]).indices.tolist())
                assert layer["moved"][i] == (clean != set(experts[: data["topK"]]))
        model.router_state.beta_coeff.zero_()
    model.router_state.beta_coeff.copy_(before)
    assert any(sum(layer["moved"]) for layer in data["beta"]["on"][1]["layers"])


def test_the_page_loads_nothing_and_holds_the_text(model, tmp_path):
    data = explored(model)
    explorer.write(tmp_path / "new" / "page.html", data, "a </script> title")
    page = (tmp_path / "new" / "page.html").read_text()
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    stored = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert stored == data | {"title": "a </script> title"}
    assert "".join(stored["texts"][0]) == CODEC.decode(tokens(3, batch=2)[0][0].tolist())


def test_a_dense_model_and_one_token_are_refused(model):
    assert "dense" in error_of(explorer.explore, build(n_exp=1)[0], CODEC, [tokens(3)[0][0]], nullcontext)
    assert "two" in error_of(explorer.explore, model, CODEC, [tokens(3)[0][0][:1]], nullcontext)


def test_hovering_over_a_token_shows_its_experts_in_a_browser(model, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs Chromium")
    data = explored(model)
    explorer.write(tmp_path / "page.html", data, "title")
    with sync_api.sync_playwright() as p:
        page = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"]).new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(f"file://{tmp_path}/page.html")
        page.select_option("#layer", "1")
        page.hover('pre[data-setting="off"] span >> nth=5')
        shown = page.inner_text("#card").split("\n")
        expert, clean, biased, gate = data["beta"]["off"][0]["layers"][1]["tokens"][5][0]
        assert f"{expert}\t{clean:.3f}\t{biased:.3f}\t{gate:.3f}" in shown
        for mode in ("gate", "loss", "moved", "differs"):
            page.select_option("#mode", mode)
            assert page.locator("pre span").count() == 2 * len(data["texts"][0])
        assert errors == []
