"""Runs and batches as HTML, which notebooks show for the value of a cell.

Every text is escaped, only a plain `http(s)` address becomes a link, and media are loaded by https.
"""

from collections.abc import Iterable
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from tracker.core.formatting import counted, duration, money, unturned
from tracker.core.net import is_loopback_url
from tracker.core.run import Output, RetryAdvice, known
from tracker.views import output_names, plain_http_origin, presentation, web_link

if TYPE_CHECKING:
    from tracker.library.batches import BatchFields
    from tracker.library.run import RunFields

MOST_CHARACTERS: Final = 4000
"""The longest text of an output that is shown; the rest is counted."""
MOST_ROWS: Final = 100
"""Most runs in one table; the rest are counted."""


def run_html(run: "RunFields") -> str:
    """A run with its state, cost, times, tags, error and outputs."""
    outputs = [
        (one, name, _kind(one))
        for one, name in zip(run.outputs, output_names(run.outputs, ()), strict=True)
    ]
    advice = run.retry_advice and known(RetryAdvice, run.retry_advice)
    if isinstance(advice, RetryAdvice):
        advice = advice.sentence
    return str(_macros().card(run, outputs, advice))


def _kind(output: Output) -> str:
    """How to show an output. By plain http only what is on this machine is loaded, as the files of
    a local FLORA are: other addresses may be those of devices in the reader's network."""
    link = web_link(output.url)
    local = link is not None and is_loopback_url(link)
    return presentation(output, media_origin=plain_http_origin(output.url) if local else None)[0]


def runs_html(runs: "Iterable[RunFields]") -> str:
    """A table with a row for each run."""
    rows = iter(runs)
    shown = list(islice(rows, MOST_ROWS))
    rest = sum(1 for _ in rows)
    return str(_macros().table(shown, counted(rest, "more run") if rest else ""))


def batch_html(batch: "BatchFields") -> str:
    """A batch with the number of its rows in each state, and its cost."""
    names = ("completed", "failed", "active", "lost", "refused", "unresolved", "in_doubt")
    counts = {name.replace("_", " "): getattr(batch, name) for name in names}
    return str(_macros().batch_card(batch, counts))


@cache
def _macros() -> Any:
    pages = Environment(
        loader=PackageLoader("tracker.library", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_turned_back,
    )
    pages.filters.update(money=money, duration=duration, shortened=_shortened)
    return pages.get_template("notebook.html").module


def _turned_back(value: object) -> object:
    """A value as it is inserted: no text turns the direction of another."""
    return unturned(value) if type(value) is str else value


def _shortened(text: str) -> str:
    rest = len(text) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS]}… ({rest:,} more characters)" if rest > 0 else text
