"""What the README and the pages of docs/ show: their Python runs, their links, commands and numbers are right."""

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import seqconv

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"# Not run by the tests: \w.*\.\n")
RESULTS = {  # page -> variables that its blocks leave behind, and their shapes
    "README.md": {"y": (8, 5000, 64)},
    "CONTRIBUTING.md": {"y": (2, 3, 50)},
    "layers.md": {"logits": (2, 10), "h": (4, 300, 256), "y": (4, 300, 256)},
    "operator.md": {"y": (2, 64, 1000)},
    "migration.md": {"out": (2, 1000, 32), "logits": (1, 8, 16), "vectors": (1, 8, 32)},
    "streaming.md": {"y": (2, 64, 500)},
    "export.md": {"y": (2, 16)},
    "packed.md": {"y": (1100, 64)},
    "ssm_kernel.md": {"y": (8, 1, 64, 3000)},
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
every_guide = pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)


def blocks(page: Path) -> list[str]:
    """The Python of a page, but for blocks whose first line says why they are not run."""
    found = FENCE.findall(page.read_text())
    assert {language for language, _ in found} <= {"", "python"}
    for language, text in found:
        unnamed = not language and re.search(r"^\s*(import|from) \w", text, re.M)
        assert not unnamed, f"Python that is not marked as such: {text}"
    return [text for language, text in found if language and not NOT_RUN.match(text)]


ALONE = [page for page in PAGES if page.name != "parallel.md"]  # which needs several processes


@pytest.mark.parametrize("page", [*ALONE, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # from torch's exporter to itself
def test_blocks_run_in_order(page):
    """The blocks of one page share their variables and start with none, so that a reader can paste them."""
    names = {}
    for text in blocks(page):
        exec(compile(text, str(page), "exec"), names)
    wanted = RESULTS.get(page.name, {})
    assert bool(wanted) == (len(names) > 0)
    for name, shape in wanted.items():
        assert names[name].shape == shape and names[name].isfinite().all(), name


@every_guide
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_the_readme_is_short_and_names_every_page():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 200
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in text, page.name


@every_guide
def test_commands_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = page.read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z -]*[a-z])", text, re.M))
    assert {target for line in named for target in line.split()} <= targets
    for module in re.findall(r"python3? -m ([\w.]+\w)", text):
        assert importlib.util.find_spec(module), module


@every_guide
def test_names_exist(page):
    for name in set(re.findall(r"\bseqconv\.[a-zA-Z][\w.]*\w", page.read_text())):
        assert pkgutil.resolve_name(name), name


def test_parameter_counts():
    from bench.lra.model import SequenceClassifier
    from bench.lra.recipes import recipe

    table = (ROOT / "docs/benchmarks.md").read_text()
    for layer in ("s4d", "long_conv"):
        made = recipe("mnist5k", layer)
        sizes = {"classes": 10, "l_max": 784, "channels": 1}
        model = SequenceClassifier(layer, made.model, made.kernel, **sizes)
        count = sum(p.numel() for p in model.parameters())
        assert f"| {count:,} |" in table, f"{layer} has {count:,} parameters"


def test_the_citation_and_the_changelog_have_the_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {seqconv.__version__}\n" in citation
    assert seqconv.__version__ in (ROOT / "CHANGELOG.md").read_text()
