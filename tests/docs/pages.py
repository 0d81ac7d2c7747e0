"""The pages of docs, and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
PAGES: Final = sorted(DOCS.glob("*.md"))
_BLOCK: Final = re.compile(
    r'^```(\w+)?(?: title="([^"]+)")?[ \t]*\n(.*?)^```$', re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: its language, the title it bears, and what is in it."""

    language: str
    title: str
    text: str
    line: int

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """The commands of a `console` block, each with the lines that are shown below it."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
        return found


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order; all blocks where none is named."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            language=language or "text",
            title=title or "",
            text=found,
            line=text.count("\n", 0, match.start()) + 1,
        )
        for match in _BLOCK.finditer(text)
        for language, title, found in [match.groups()]
        if not languages or language in languages
    ]


def shown(lines: list[str]) -> re.Pattern[str]:
    """What the lines below a command say about its output.

    `…` stands for anything within a line, and for any lines where it stands alone; runs of spaces
    are alike, because tables are as wide as what is in them.
    """
    parts = []
    for line in lines:
        if line == "…":
            parts.append(r"(?:.*\n)*?")
            continue
        words = [re.escape(word).replace("…", ".*?") for word in line.split()]
        parts.append(r"[ \t]*" + r"[ \t]+".join(words) + r"[ \t]*\n")
    return re.compile("".join(parts))
