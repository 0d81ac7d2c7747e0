"""Untrusted text on a terminal: control characters are escaped.

Names, messages, headers and links may hold characters that move the cursor, change the title, clear
the screen or reverse the direction of a line.
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
    """`text` on one line, with escapes such as `\\x1b` in place of control characters."""
    return text if text.isprintable() else _IN_A_LINE.sub(_escape, text)


def plain_lines(text: str) -> str:
    """Like `plain`, but keeps tabs and line ends."""
    return text if text.isprintable() else _IN_LINES.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
