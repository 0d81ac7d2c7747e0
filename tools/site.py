"""What makes a site of docs: hooks that mkdocs.yml names.

The pages are read in a checkout as well, so their links lead to files of the checkout. In the site

* README.md, CONTRIBUTING.md, SECURITY.md and CHANGELOG.md are pages too;
* any other file outside docs that a page links becomes a page that shows it; a folder stays text;
* docs/cli.md ends with what each command's `--help` says.
"""

import posixpath
import re
from pathlib import Path
from typing import Any, Final

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tracker.cli.app import app

ROOT: Final = Path(__file__).parents[1]
DOCS: Final = ROOT / "docs"
TOP: Final = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the checkout's top, and what they are called in the site."""
LANGUAGES: Final = {
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".json": "json",
    ".py": "python",
    ".service": "ini",
    ".sh": "sh",
    ".csv": "csv",
}
_LINK: Final = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
_FENCE: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of files outside docs."""
    shown: set[Path] = set()
    for page in files.documentation_pages():
        translated(page.content_string, source=DOCS / page.src_uri, page=page.src_uri, shown=shown)
    for name, page_name in TOP.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        content = translated(text, source=ROOT / name, page=page_name, shown=shown)
        files.append(File.generated(config, page_name, content=content))
    for path in sorted(shown):
        files.append(File.generated(config, _page_of(path), content=_as_page(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Makes a page's links lead to pages of the site."""
    name = page.file.src_uri
    if page.file.generated_by:
        return markdown
    text = translated(markdown, source=DOCS / name, page=name, shown=set())
    return text + _commands() if name == "cli.md" else text


def on_page_content(html: str, **_: Any) -> str:
    """Leaves out the sign with which a docstring announces code."""
    return html.replace("<p>::</p>\n", "")


def translated(text: str, *, source: Path, page: str, shown: set[Path]) -> str:
    """`text`, a page called `page` made of the file `source`, with links that hold in the site.

    Files outside docs that it links are added to `shown`. Code is left as it is.
    """

    def link(found: re.Match[str]) -> str:
        bang, words, target, anchor = found.groups()
        if re.match(r"[a-z]+:", target):
            return found[0]
        path = (source.parent / target).resolve()
        if path.is_dir() and path.is_relative_to(ROOT):
            return words
        if path.is_relative_to(DOCS):
            there = path.relative_to(DOCS).as_posix()
        elif path.parent == ROOT and path.name in TOP:
            there = TOP[path.name]
        elif path.is_file() and path.is_relative_to(ROOT):
            shown.add(path)
            there = _page_of(path)
        else:
            return found[0]  # it leads nowhere, which the strict build says
        relative = posixpath.relpath(there, posixpath.dirname(page) or ".")
        return f"{bang}[{words}]({relative}{anchor or ''})"

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(link, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(link, text[end:])])


def _page_of(path: Path) -> str:
    return f"files/{path.relative_to(ROOT).as_posix()}.md"


def _as_page(path: Path) -> str:
    text = path.read_text(encoding="utf-8").rstrip("\n")
    language = LANGUAGES.get(path.suffix, "sh" if text.startswith("#!") else "text")
    return f"# {path.relative_to(ROOT).as_posix()}\n\n````{language}\n{text}\n````\n"


def _commands() -> str:
    """The help of every command, as sections."""
    parts = ["\n\n## What `--help` says\n"]
    for words, command in commands():
        context = command.make_context(words, [], resilient_parsing=True, max_content_width=80)
        parts.append(f"\n### `{words}`\n\n```text\n{command.get_help(context)}\n```\n")
    return "".join(parts)


def commands() -> list[tuple[str, Any]]:
    """Every command by its full name, groups left out."""
    found = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        if inner is None:
            found.append((f"tracker {name}", command))
        else:
            found += [(f"tracker {name} {one}", each) for one, each in inner.items()]
    return found
