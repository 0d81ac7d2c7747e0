"""Other people's text on a terminal: what would steer it is shown, not obeyed.

A terminal moves its cursor, changes its title and clears itself at control characters, and turns
the direction of a line at others. Names, messages, headers and links may hold all of them.
"""

import re
from typing import Final

_STEERS: Final = (
    "\0-\x1f\x7f-\x9f"  # control characters, the escape among them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the direction of the text that follows
    "\u2028\u2029"  # line ends
    "\ud800-\udfff"  # halves of characters, which no terminal's encoding holds
)
_IN_A_LINE: Final = re.compile(f"[{_STEERS}]")
_IN_LINES: Final = re.compile(f"(?![\t\n])[{_STEERS}]")


def plain(text: str) -> str:
    """`text` on one line, with escapes such as `\\x1b` in place of what would steer a terminal."""
    return text if text.isprintable() else _IN_A_LINE.sub(_escape, text)


def plain_lines(text: str) -> str:
    """As `plain`, but tabs and line ends stay."""
    return text if text.isprintable() else _IN_LINES.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
