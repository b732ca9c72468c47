"""The documentation site: its reference has every public name, its numbers are those of other pages, and its check of
addresses finds wrong ones. `make docs` builds the site itself."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import seqconv
import seqconv.export
import seqconv.models
import seqconv.nested
import seqconv.onnx
import seqconv.parallel
import seqconv.streaming

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs/site"
CHOOSING = ROOT / "docs/choosing.md"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SITE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load("check")


# ---- the reference ----


def public(module: ModuleType) -> set[str]:
    """The full names of __all__; without one, of what the module defines or imports `as` itself."""
    names = getattr(module, "__all__", None)
    if names is None:
        text = Path(module.__file__).read_text()
        names = re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", text, re.M)
        names += re.findall(r"^from .* import (\w+) as \1$", text, re.M)
    return {f"{module.__name__}.{name}" for name in names}


MODULES = [
    seqconv,
    seqconv.convert,
    seqconv.export,
    seqconv.models,
    seqconv.nested,
    seqconv.nn,
    seqconv.onnx,
    sys.modules["seqconv.optim"],
    seqconv.parallel,
    seqconv.streaming,
]


def referred() -> list[str]:
    """The names of the reference. Where a module has the name of its function, that name stands twice."""
    text = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    return [re.sub(r"\.(\w+)\.\1$", r".\1", n) for n in re.findall(r"^::: (\S+)$", text, re.M)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name_once(module):
    found = referred()
    assert len(found) == len(set(found))
    names = public(module)
    assert names, module
    # These are names of two modules, and have one place.
    missing = names - set(found) - {"seqconv.param_groups", "seqconv.export.freeze"}
    assert not missing, f"docs/api lacks {sorted(missing)}"


def test_the_reference_has_no_other_names():
    assert set(referred()) <= set().union(*map(public, MODULES))


def test_every_page_has_its_place():
    """The navigation names every page of docs/ and no other one."""
    navigation = set(re.findall(r": ([\w/.]+\.md)$", (SITE / "mkdocs.yml").read_text(), re.M))
    pages = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert pages <= navigation
    assert all((ROOT / page).is_file() for page in navigation)


# ---- numbers ----


def numbers(text: str) -> list[str]:
    return re.findall(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?", text)


def tables() -> list[tuple[str, list[str]]]:
    """The page that a table of choosing.md says it is from, and its rows."""
    text = CHOOSING.read_text()
    found = re.findall(r"^<!-- from (\S+) -->\n(?:\|.*\n){2}((?:\|.*\n)+)", text, re.M)
    return [(source, rows.splitlines()) for source, rows in found]


def same_row(row: str, line: str) -> bool:
    """Whether the line has the row's first cells, as far as they are words, and its numbers in their order."""
    keys, rest = [], [cell.strip() for cell in row.strip("|").split("|")]
    while (rest and not re.match(r"\d[\d.,]*( |x|$)", rest[0])) or not keys:
        keys.append(rest.pop(0))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    there = iter(numbers(" ".join(cells[len(keys) :])))
    return cells[: len(keys)] == keys and all(number in there for number in numbers(" ".join(rest)))


def test_numbers_are_those_of_their_pages():
    found = tables()
    assert len(found) == CHOOSING.read_text().count("<!-- from ") == 5
    for source, rows in found:
        text = (ROOT / source).read_text()
        for row in rows:
            if source == "docs/benchmarks.md" and not row.count("|") > 3:
                (bits,) = numbers(row)  # of the language models, which stand in a sentence
                assert re.search(rf"\b{re.escape(bits)}\b", text), row
            else:
                assert any(same_row(row, line) for line in text.splitlines()), (
                    f"{source} has no {row}"
                )


def test_another_number_is_noticed():
    line = "| S4D | 2.30x, 11.5 ms | 2.86x, 43.6 ms | 164, 464 |"
    assert same_row("| S4D | 11.5 ms | 43.6 ms | 164 |", line)
    assert not same_row("| S4D | 11.5 ms | 43.7 ms | 164 |", line)
    assert not same_row("| S4D | 43.6 ms | 11.5 ms | 164 |", line)
    assert not same_row("| SGConv | 11.5 ms | 43.6 ms | 164 |", line)


# ---- pictures ----


def test_pictures_are_small_and_every_one_has_a_place():
    text = (ROOT / "docs/gallery.md").read_text()
    shown = {(ROOT / "docs" / path).resolve() for path in re.findall(r"!\[.+?\]\((.+?)\)", text)}
    drawn = set((ROOT / "bench/results").rglob("*.png"))
    assert drawn == shown
    assert sum(path.stat().st_size for path in drawn) < 400_000


# ---- addresses ----

PAGE = '<h2 id="here">x</h2><a href="{}">x</a><img src="picture.png">'


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("#here", None),
        ("other/", None),
        ("other/#there", None),
        ("other/index.html", None),
        ("/other/", None),
        ("https://example.org/page", None),  # is followed, not loaded
        ("mailto:someone", None),
        ("#nowhere", "no such anchor"),
        ("other/#here", "no such anchor"),
        ("absent/", "does not exist"),
        ("../outside.html", "does not exist"),
    ],
)
def test_wrong_links_are_found(tmp_path, address, problem):
    site = tmp_path / "site"
    (site / "other").mkdir(parents=True)
    (tmp_path / "outside.html").touch()
    (site / "picture.png").touch()
    (site / "other/index.html").write_text('<h1 id="there">x</h1>')
    (site / "index.html").write_text(PAGE.format(address))
    found = list(check.problems(site))
    assert len(found) == (problem is not None)
    assert problem is None or (problem in found[0] and address in found[0])


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://example.org/x.js"></script>',
        '<img src="//example.org/x.png">',
        '<link rel="stylesheet" href="https://example.org/x.css">',
        '<link rel="preconnect" href="https://example.org">',
        '<img srcset="https://example.org/x.png 2x">',
        "<style>@import url(https://example.org/x.css)</style>",
    ],
)
def test_loads_from_other_hosts_are_found(tmp_path, text):
    (tmp_path / "index.html").write_text(text)
    (found,) = check.problems(tmp_path)
    assert "index.html loads" in found


def test_styles_that_load_from_other_hosts_are_found(tmp_path):
    (tmp_path / "index.html").write_text('<link rel="canonical" href="https://example.org">')
    assert list(check.problems(tmp_path)) == []
    (tmp_path / "x.css").write_text("a { background: url(https://example.org/x.png) }")
    (found,) = check.problems(tmp_path)
    assert "x.css loads" in found


def test_an_empty_site_is_a_problem(tmp_path):
    assert len(list(check.problems(tmp_path))) == 1
