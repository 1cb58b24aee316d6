"""The audit's page: its sections, names that are not text, and runs without some of the measurements."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from auditing import figures, report
from auditing.criteria import CRITERIA
from auditing.damage import DAMAGES, SIGNALS, Moved
from auditing.healing import Healing
from auditing.measure import Measured
from auditing.results import AuditedRun, Group
from auditing.routing import Picture
from auditing.subsets import EVERY, MaskedSets
from tests.comparison.studies import make_run
from trainer.errors import UserError

SECTIONS = ("What was measured", "Which criteria know what an expert is worth", "Worth", "Several experts at once")
SECTIONS += ("Proposed prunes", "Healing", "Damage", "The router", "How it was made")
SOME = ("phi_slow", "load", "mean_gate", "reap")
PROPOSAL = {"expert_id": "L1_E2", "reason": "low_coherence", "action": "open", "step": 10}


@pytest.fixture(autouse=True)
def no_vega(monkeypatch):
    """Bundling Vega-Lite takes seconds; the tests of compare.py's page do it."""
    monkeypatch.setattr("comparison.report._script", lambda: "")


def make_audited(seed, layers=2, experts=8, criteria=SOME, steps=5, name=None, decisions=(PROPOSAL,)):
    rng = np.random.default_rng(seed)
    run = dataclasses.replace(make_run(seed, arm="on"), name=name or f"out/on_seed{seed}", decisions=list(decisions))
    blocks = [2 * i + 1 for i in range(layers)]
    worth = rng.gamma(2, 0.02, (layers, experts))
    masked = worth + rng.normal(0, 0.001, (4, layers, experts))
    scores = {c: worth + rng.normal(0, 0.03, worth.shape) for c in criteria}
    measured = Measured(run, blocks, 2, np.full(4, 2.0), masked, masked * 1.1, scores)
    places = [*(f"L{block}" for block in blocks), EVERY]
    masked_sets = [
        MaskedSets(place, size, {c: rng.random() for c in criteria}, 0.0, place != EVERY, rng.random(8).tolist())
        for place in places
        for size in (1, 2, 4)
    ]
    special = {(block, e): [(65, 0.5, 30), (200, 0.25, 20)] for block in blocks for e in range(experts)}
    shares = torch.rand(layers, experts, experts), torch.full((layers, experts), 1 / experts)
    picture = Picture(blocks, *shares, special, {10: [0.5] * layers}, {})
    healing = [Healing(c, 1, steps, 0.1 * rng.random(), 0.01) for c in criteria]
    moved = [
        Moved(
            damage,
            layer,
            1,
            {s: rng.normal(size=steps) for s in SIGNALS} if damage else {},
            {s: rng.random((layers, experts)) for s in SIGNALS},
        )
        for damage in ("", *DAMAGES)
        for layer in range(layers if damage else 1)
    ]
    return AuditedRun(measured, picture, masked_sets, healing, moved)


def page_of(*groups, left_out=(), command="python audit.py out"):
    arms = [report.arm_of(group, f"{group.arm}: ") for group in groups]
    return report.as_html(arms, list(left_out), report.made(list(groups), command, "2026-01-01"))


def body_of(page):
    return page.partition("<main>")[2].partition("</main>")[0]


def charts_of(page):
    return json.loads(re.search(r'id="charts">(.*?)</script>', page, re.S)[1])


def test_page_holds_its_sections_and_the_folder_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "png", lambda figure: figure.title.encode())
    monkeypatch.setattr(report, "DATA", tmp_path)
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "meta.json").write_text('{"tokenizer": "bytes", "vocab_size": 257}')
    groups = [Group("on", [make_audited(seed) for seed in range(7)])]
    drawn = report.write(tmp_path, groups, [], "python audit.py out", "2026-01-01")
    page = (tmp_path / "audit.html").read_text()
    body = body_of(page)
    assert re.findall("<h2>(.*?)</h2>", body) == [*SECTIONS]
    assert "<h1>phi_slow ranks experts better than chance" in body and "six runs of an arm" not in body
    assert "&#34;A&#34; 50% of 30, id 200 25% of 20" in body and "on_seed3" in body
    assert len(set(drawn.values())) == len(drawn) == len(re.findall("<figure>", body)) == 8
    assert all(path.read_bytes().decode() == title for title, path in drawn.items())
    assert {f'id="{name}"' for name in charts_of(page)} == set(re.findall(r'id="chart\d+_\d+"', body))
    assert json.loads((tmp_path / "audit.json").read_text())["arms"]["on"]["runs"].keys() == {
        run.name for run in groups[0].runs
    }


@pytest.mark.parametrize(
    "panel", ["correlations", "scatter", "worth", "masked_sets", "roc", "detected", "trajectories"]
)
def test_figures_are_drawn_as_png(panel):
    group = Group("on", [make_audited(seed, experts=4) for seed in range(2)])
    found, moved = report.ranked(group)[:2], group.runs[0].moved
    panels = {
        "correlations": lambda: [figures.correlations(found, [0, 1])],
        "scatter": lambda: figures.scatter(group.measured, found),
        "worth": lambda: [figures.worth(group.measured[0])],
        "masked_sets": lambda: figures.masked_sets([run.masked_sets for run in group.runs])[:1],
        "roc": lambda: [figures.roc(group.roc)],
        "detected": lambda: [figures.detected(group.detections)],
        "trajectories": lambda: figures.trajectories(moved)[:1],
    }
    assert report.png(figures_of(panels[panel]())).startswith(b"\x89PNG")


def figures_of(panels):
    return report.Figure("Title", "Caption.", panels, 2)


def test_names_are_text_whatever_they_hold():
    name = "</script><b id=injected>{{ 1 }}\udcff"
    runs = [make_audited(seed, 1, 4, name=f"{name}{seed}") for seed in range(2)]
    bare = [dataclasses.replace(run, masked_sets=[], moved=[]) for run in runs]
    page = page_of(Group("on", runs), Group("off", bare), left_out=[name], command=name)
    page.encode(errors="backslashreplace")
    assert "<b id" not in page and page.count("</script>") == 2 and "&lt;b id=injected&gt;{{ 1 }}" in page
    assert len(re.findall("<h1>", page)) == 2 and "<h1>off: " in page
    assert all(text.isascii() or "±" in text for text in map(json.dumps, charts_of(page).values()))


def test_one_run_gets_no_verdicts_and_says_how_many_are_needed():
    body = body_of(page_of(Group("on", [make_audited(3, 1, 4)])))
    assert "Intervals and verdicts need six runs of an arm" in body and "there is 1" in body
    assert "its own undamaged twin" in body and "95% interval</th>" not in body


def test_page_without_phi_searches_healing_and_damage():
    criteria = [
        name
        for name in CRITERIA
        if name not in ("phi_slow", "phi_mid", "phi_fast", "man", "ean", "aimer", "first_order")
    ]
    bare = [
        dataclasses.replace(make_audited(seed, criteria=criteria, decisions=()), masked_sets=[], healing=[], moved=[])
        for seed in range(6)
    ]
    body = body_of(page_of(Group("on", bare)))
    assert "<h1>phi was not measured in training" in body and "No expert was proposed" in body
    without = {"Several experts at once", "Healing", "Damage"}
    assert set(re.findall("<h2>(.*?)</h2>", body)) == set(SECTIONS) - without


def test_page_of_a_large_model_is_small():
    large = make_audited(0, layers=16, experts=64)
    page = page_of(Group("on", [dataclasses.replace(large, moved=[])]))
    assert len(page.encode()) < 5e6 and "5 of the 16 layers are shown" in page
    assert figures.spaced(range(16), 4) == [0, 5, 10, 15] and figures.spaced(range(3), 1) == [0]


def test_a_constant_criterion_has_no_correlation():
    audited = make_audited(0)
    audited.measured.scores["load"][:] = 1.0
    (row,) = (row for row in report.ranking_rows(Group("on", [audited])) if row["criterion"] == "load")
    assert row["mean rank correlation"] is None
    assert report.ranked(Group("on", [audited]))[-1].criterion == "load"


def test_wandb_gets_answers_ranking_and_figures(tmp_path):
    tables = SimpleNamespace(Table=lambda columns, data: (columns, data), Image=str)
    group = Group("on", [make_audited(seed, 1, 4) for seed in range(6)])
    content = report._content(tables, [group], {"Rise of the loss": tmp_path / "rise.png"})
    columns, rows = content["ranking"]
    assert {row[columns.index("criterion")] for row in rows} == set(SOME) and {len(row) for row in rows} == {
        len(columns)
    }
    assert content["sentences"][1][0] == ["on", group.sentences[0]] and content["figures/Rise of the loss"].endswith(
        ".png"
    )


def test_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "png", lambda figure: b"")
    monkeypatch.setattr(report, "as_html", lambda *_: "")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report to"):
        report.write(tmp_path / "file", [Group("on", [make_audited(0)])], [], "", "")
