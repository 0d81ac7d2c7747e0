"""What an action has to say for itself, above the page that it leaves behind."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Said:
    """One sentence. `kind` is how it went."""

    kind: Literal["good", "warn", "bad"]
    text: str
