"""The committed inputs: for each target a folder of files with descriptive names."""

import re
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")


def corpus(name: str) -> dict[str, bytes]:
    """The committed inputs of a target, by name. `<<x*9>>` in a file stands for nine x."""
    return {
        path.name: re.sub(
            rb"<<(.{1,20}?)\*(\d+)>>", lambda found: found[1] * int(found[2]), path.read_bytes()
        )
        for path in sorted((CORPUS / name).iterdir())
    }
