"""Checks a built site: every link and anchor leads somewhere, and nothing is loaded from another host.

python docs/site/check.py build/site
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# A browser fetches these by itself: every src, every srcset, and links of these relations. It only follows <a href>.
LOADING = {
    "stylesheet",
    "icon",
    "preload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "modulepreload",
}
ELSEWHERE = re.compile(r"(?:url\(\s*|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)")


class Page(HTMLParser):
    """The anchors of a page, and its addresses as pairs (address, whether the browser loads it by itself)."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.addresses: list[tuple[str, bool]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        loading = tag == "link" and bool(LOADING & set(values.get("rel", "").split()))
        if "href" in values:
            self.addresses.append((values["href"], loading))
        loaded = [values["src"]] if "src" in values else []
        loaded += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        self.addresses += [(address, True) for address in loaded]


def wrong(
    address: str, loaded: bool, path: Path, site: Path, pages: dict[Path, Page]
) -> str | None:
    """What is wrong with an address on the page at that path, in words that follow the page's name."""
    parts = urlsplit(address)
    if parts.scheme == "data":
        return None
    if parts.scheme or parts.netloc:
        return f"loads {address} from another host" if loaded else None
    target = path
    if parts.path:
        # The page of errors is served at any depth, and its addresses begin at the root.
        start = site if parts.path.startswith("/") else path.parent
        target = (start / unquote(parts.path).lstrip("/")).resolve()
        target = target / "index.html" if target.is_dir() else target
    if not target.is_relative_to(site) or not target.is_file():
        return f"leads to {address}, which does not exist"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return f"leads to {address}, and there is no such anchor"
    return None


def problems(site: Path) -> Iterator[str]:
    """One sentence for each address that is wrong."""
    site = site.resolve()
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no pages"
    for path, page in pages.items():
        for address, loaded in page.addresses:
            problem = wrong(address, loaded, path, site, pages)
            if problem:
                yield f"{path.relative_to(site)} {problem}"
    for path in (*pages, *sorted(site.rglob("*.css"))):
        for address in ELSEWHERE.findall(path.read_text()):
            yield f"{path.relative_to(site)} loads {address} from another host"


def main() -> None:
    site = Path(sys.argv[1])
    found = list(problems(site))
    for sentence in found:
        print(sentence)
    if found:
        sys.exit(f"{len(found)} wrong addresses")
    print(f"{site}: every link leads somewhere, and nothing is loaded from elsewhere")


if __name__ == "__main__":
    main()
