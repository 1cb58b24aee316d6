"""The table that a run prints."""

import pytest

from tests.helpers.runs import ALL_ON
from trainer.console import ROWS_PER_HEADER, Console, wrapped
from trainer.settings import from_values

LINE = {"step": 599_900, "train/loss": 10.8249, "time/tokens_per_s": 99_999.4, "lr": 6e-4, "grad_norm": 12.0}
LINE |= {f"{group}/L{block}/{name}": block + value for block in (0, 2) for group, name, value in (
    ("beta", "spread", 0.25), ("routing", "js", 1e-9), ("routing", "flip", 0.5), ("routing", "relevance", 0.25),
    ("routing", "load_cv", 0.125), ("coherence", "phi_slow_min", -1.5), ("coherence", "phi_slow_max", -1.25),
)}  # fmt: skip
LINE |= {"lifecycle/candidates": 3.0, "coherence/L4/phi_slow_min": None}
BASIC, BIASED = ["step", "loss", "val", "tok/s", "left"], ["spread", "JS", "flip", "r"]


def printed(width, monkeypatch, capsys, **settings):
    """The lines that a Console prints for LINE and for an evaluation."""
    monkeypatch.setenv("COLUMNS", str(width))
    console = Console(from_values({"max_iters": 600_000, "n_exp": 4, **settings}), first_step=599_899)
    for line in (LINE, {"step": 600_000, "val/loss": 1.5}):
        console.row(line)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("width", "settings", "titles"),
    [
        (80, ALL_ON, [*BASIC, *BIASED, "phi"]),
        (130, ALL_ON, [*BASIC, *BIASED, "phi", "prunes", "phi max", "load cv", "grad", "lr"]),
        (80, {"chrono_coherence": True}, [*BASIC, "phi", "phi max", "load cv", "grad"]),
        (80, {}, [*BASIC, "load cv", "grad", "lr"]),
    ],
)
def test_the_table_fits_the_terminal_and_shows_what_is_on(width, settings, titles, monkeypatch, capsys):
    *legend, header, row, evaluation = printed(width, monkeypatch, capsys, **settings)
    assert max(map(len, (*legend, header, row, evaluation))) <= width
    assert [title.strip() for title in header.split("  ") if title.strip()] == titles
    text = " ".join(" ".join(legend).split())
    assert all(f"{title} = " in text for title in titles[1:])
    assert ("beta" in text) == ("spread" in titles)
    expected = {"step": "599900", "loss": "10.8249", "tok/s": "99,999", "spread": "2.2500", "JS": "2.0e+00"}
    expected |= {"flip": "2.500", "r": "0.25", "phi": "-1.500", "phi max": "+0.750", "load cv": "2.125"}
    shown = row.split()
    shown.remove(next(cell for cell in shown if ":" in cell))  # time left
    values = expected | {"prunes": "3", "grad": "12.000", "lr": "6.0e-04"}
    assert shown == [values[title] for title in titles if title in values]
    assert evaluation.split() == ["600000", "1.5000"] and evaluation.index("1.5000") == header.index("val") - 3


def test_the_header_is_repeated_and_a_long_line_is_broken_between_words(monkeypatch, capsys):
    console = Console(from_values({}))
    for step in range(ROWS_PER_HEADER + 1):
        console.row({"step": step})
    assert sum(line.split()[0] == "step" for line in capsys.readouterr().out.splitlines()) == 2
    line = "[DRY-RUN] step 1000: prune L0_E6 (reason=low_coherence, phi_slow=0.185, tokens=1,656,000)"
    assert max(map(len, wrapped(line, 60).splitlines())) <= 60
    assert " ".join(wrapped(line, 60).split()) == line and wrapped(line, 200) == line
