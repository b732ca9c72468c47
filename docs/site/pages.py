"""MkDocs calls these functions: they choose the site's files, and send links to sources to the repository."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PATTERNS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/api/*.md",
    "docs/site/*.css",
    "bench/results/*.md",
    "bench/results/**/*.png",
)
# Fenced blocks and spans of code hold no links.
CODE_OR_LINK = re.compile(
    r"^```.*?^```|`[^`\n]+`|\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)", re.M | re.S
)


def on_files(files: Files, config) -> Files:
    """The theme's files, and those of PATTERNS under the paths that they have in the repository."""
    kept = [
        file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")
    ]
    paths = sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)})
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        kept.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return Files(kept)


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links to files of the repository that have no place on the site lead to the repository instead."""

    def target(match: re.Match) -> str:
        path, anchor = match.group(1), match.group(2) or ""
        if path is None:
            return match.group()
        name = os.path.normpath(os.path.join(os.path.dirname(page.file.src_uri), path))
        if files.get_file_from_path(name) or not (ROOT / name).exists():
            return match.group()
        return f"]({config.extra['repository']}/blob/main/{name}{anchor})"

    return CODE_OR_LINK.sub(target, markdown)


def on_page_content(html: str, page, config, files: Files) -> str:
    """A picture is a link to its file, which a phone can enlarge."""
    return re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', html)
