"""The report's page, its figures and its folder. Tests that drive a browser need playwright and Chromium."""

import dataclasses
import re
import shutil

import pytest

import compare
from comparison import figures, report
from tests.comparison.studies import arms_of, make_run, make_study, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CSS = (report.Path(report.__file__).parent / "report.html.j2").read_text()


def luminance(colour):
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(a, b):
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_text_and_lines_have_the_contrast_of_wcag_aa():
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", rule)) for rule in re.findall(r":root {(.*?)}", CSS)]
    assert len(schemes) == 2  # light and dark
    for scheme in schemes:
        assert all(contrast(scheme[a], scheme[b]) >= 4.5 for a in ("ink", "soft") for b in ("ground", "panel"))
        assert all(contrast(colour, scheme["ground"]) >= 3 for colour in figures.COLOURS.values())


def test_curves_are_differences_to_the_run_of_the_same_seed():
    arms = arms_of(make_study(effect=-0.05, noise=0.0, seeds=2))
    chart = figures.curves(arms, "val/loss", "loss").to_dict()
    (rows,) = chart["datasets"].values() if "datasets" in chart else [chart["layer"][0]["data"]["values"]]
    last = {(row["arm"], row["seed"]): row["difference"][-1] for row in rows}
    assert last == {(arm, seed): pytest.approx(-0.05 * (arm == "on")) for arm in arms for seed in ("0", "1")}
    steps, (values,) = figures.thinned(list(range(1000)), [[0.1] * 1000], 1)
    assert len(steps) == len(values) <= figures.MAX_POINTS[0] and steps[-1] == 999


def test_one_pair_gets_its_numbers_and_no_verdict_and_no_report_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [str(write(tmp_path / "runs" / run.name, run)) for run in make_study(effect=-0.05, noise=0.0, seeds=2)]
    (off, on, _), out = runs[:3], tmp_path / "out" / "compare_off0_on0"
    assert compare.main([off, on]) == 0
    said = capsys.readouterr().out
    assert "\nNo verdict: one pair of runs is no evidence: runs with nearly" in said and "0.01 to 0.02" in said
    assert "differs by -0.0500 nats in one pair (seed 0)" in said
    assert "For a verdict on another model: python compare.py config/" in said
    assert re.search(r"final validation loss, nats +\S+ +\S+ +-0.0500\b", said)
    page = (out / "report.html").read_text()
    assert "All contrasts" not in page and report.FEW not in page and "-0.0500" in page
    other = make_run(0, -0.05, "on", learning_rate=0.5)
    compare.main([off, str(write(tmp_path / "other", other))])
    said = capsys.readouterr().out
    assert "\nNo verdict: 'on' and 'off' also differ in learning_rate (0.5 against" in said and "-0.05" not in said
    compare.main([*runs[3:], f"--out_dir={out}"])  # other runs
    assert "has the report of other runs, so this one is in" in capsys.readouterr().out
    assert (out / "report.html").read_text() == page and (tmp_path / "out" / "compare_off0_on0_2").exists()
    compare.main([*runs, f"--out_dir={out}"])  # more runs
    assert "is replaced" not in capsys.readouterr().out
    compare.main([off, on, f"--out_dir={out}"])
    assert "on 6 runs in" in capsys.readouterr().out


def test_names_are_text_in_the_page_and_in_markdown_whatever_they_hold(tmp_path):
    name = "<b>|`a`[c](d) $\\foo$ &amp;\n*\udcff*"
    runs = [make_run(seed, arm=arm, wandb_project=name, git_commit=name) for arm in ("off", "on") for seed in (1, 2)]
    runs[-1] = dataclasses.replace(runs[-1], name=name, config=runs[-1].config | {"learning_rate": 0.5})
    arms = arms_of(runs[:-1])
    comparison = report.compare(arms, {}, [f"{name}: left out"], {}, f"python compare.py {name}", tmp_path)
    report.write(tmp_path, comparison)
    page, markdown = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    for text in (page, markdown):
        assert "left out" in text and "python compare.py" in text
    markup = r"(?<!\\)[<`*|$&\[]"
    lines = [line for line in markdown.splitlines() if "udcff" in line]
    assert len(lines) == 3  # the reason, the commit and the command
    for line in lines:
        assert not re.search(markup, line.strip("| ").replace(" | ", "  "))
    assert "<b>" not in page.partition('id="charts"')[0] and "&lt;b&gt;" in page


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_page_works_offline_in_a_browser(tmp_path):
    """The names of settings and runs are text, also those that look like HTML."""
    browsers = pytest.importorskip("playwright.sync_api")
    name = "</script><b id=injected>"
    values = {f"expert/L0_E{e}/phi_slow": e / 8 for e in range(8)} | {"routing/L0/load_cv": 0.5}
    runs = [make_run(seed, 0.1 * (arm == "on"), arm, values) for arm in ("off", "on") for seed in (1, 2)]
    proposal = {"expert_id": name, "reason": "low_coherence", "action": "open", "step": 10}
    runs = [dataclasses.replace(run, decisions=[proposal]) for run in runs]
    comparison = report.compare(arms_of(runs), {}, [name], {}, name, tmp_path)
    report.write(tmp_path, comparison)
    with browsers.sync_playwright() as p, p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
        page = browser.new_context(viewport={"width": 400, "height": 900}, offline=True).new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        page.on("requestfailed", lambda request: errors.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        page.wait_for_selector("html[data-drawn]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.locator("#injected").count() == 0 and not errors
        curves = page.locator("figure", has=page.get_by_text("first tenth")).locator("svg").first
        lines = curves.locator(".mark-line path")
        assert lines.count() == 6  # two seeds and their mean, for each arm
        curves.scroll_into_view_if_needed()
        box = curves.bounding_box()
        for x in (0.5, 0.52):
            page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] / 2)
            page.wait_for_timeout(50)
        assert re.search(r"on\s+\+0\.0\d{3}", page.locator("#vg-tooltip-element").inner_text())
        page.uncheck("input[value=off]")
        page.wait_for_function("n => document.querySelectorAll('#chart1_0 .mark-line path').length == n", arg=3)
        page.select_option("select[name=seed]", "2")
        page.wait_for_function("n => document.querySelectorAll('#chart1_0 .mark-line path').length == n", arg=2)
