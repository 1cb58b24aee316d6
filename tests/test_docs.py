"""The names in docs/reliability.md."""

import re

import pytest

from tests.helpers.runs import ROOT

TESTS = ROOT / "tests"
PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_every_test_that_a_page_names_exists():
    """A name without a file is in the file of the head of its table."""
    functions = {}
    for path in TESTS.rglob("test_*.py"):
        functions.setdefault(path.name, set()).update(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    file = None
    for line in PAGE.splitlines():
        of_table = re.search(r"tests in `(test_\w+\.py)`", line)
        file = of_table[1] if of_table else file if line.startswith("|") else None
        for in_file, name in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", line):
            assert name in functions.get(in_file or file, ()), line
    assert PAGE.count("::test_") > 50


@pytest.mark.parametrize("table", re.findall(r"^\|.*\n\| ---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE))
def test_every_row_of_a_table_names_a_test(table):
    for row in table.splitlines():
        assert re.search(r"`(test_\w+\.py::)?test_\w+` \|$", row), row
