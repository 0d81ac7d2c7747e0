"""Keeps the final status, outputs and cost of every FLORA run, even when its callback is lost.

::

    from tracker import Tracker

    async with Tracker.from_env() as tracker:
        run = await tracker.start("icon-pack", {"prompt": "beach toys"}, idempotency_key="order-17")
        done = await run.wait(timeout=600)
        print(done.charged_cost, [output.url for output in done.outputs])

`tracker.sync.Tracker` is the same for code without an event loop; `tracker.errors` has the errors.
"""

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tracker import errors as errors
    from tracker import sync as sync
    from tracker.core.run import Output
    from tracker.delivering.downloads import DownloadReport
    from tracker.delivering.files import ManifestEntry
    from tracker.delivering.saving import DownloadResult
    from tracker.library.batches import Batch, BatchResult
    from tracker.library.client import Technique, Tracker, VerifiedCallback
    from tracker.library.run import Event, Run, RunChange, RunEvent, SpendingSummary
    from tracker.receiving.receive import Received
    from tracker.settings import Settings
    from tracker.store.queries.spending import Spending, Usage
    from tracker.web.app import Mounted

    __version__: str

__all__ = [
    "Batch",
    "BatchResult",
    "DownloadReport",
    "DownloadResult",
    "Event",
    "ManifestEntry",
    "Mounted",
    "Output",
    "Received",
    "Run",
    "RunChange",
    "RunEvent",
    "Settings",
    "Spending",
    "SpendingSummary",
    "Technique",
    "Tracker",
    "Usage",
    "VerifiedCallback",
]

_MODULES: Final = {
    "Batch": "tracker.library.batches",
    "BatchResult": "tracker.library.batches",
    "DownloadReport": "tracker.delivering.downloads",
    "DownloadResult": "tracker.delivering.saving",
    "Event": "tracker.library.run",
    "ManifestEntry": "tracker.delivering.files",
    "Mounted": "tracker.web.app",
    "Output": "tracker.core.run",
    "Received": "tracker.receiving.receive",
    "Run": "tracker.library.run",
    "RunChange": "tracker.library.run",
    "RunEvent": "tracker.library.run",
    "Settings": "tracker.settings",
    "Spending": "tracker.store.queries.spending",
    "SpendingSummary": "tracker.library.run",
    "Technique": "tracker.library.client",
    "Tracker": "tracker.library.client",
    "Usage": "tracker.store.queries.spending",
    "VerifiedCallback": "tracker.library.client",
}


# On demand: `import tracker` and `tracker --help` load nothing else.
def __getattr__(name: str) -> Any:
    from importlib import import_module, metadata  # noqa: PLC0415

    if name == "__version__":
        return metadata.version("flora-run-tracker")
    if name in ("errors", "sync"):
        return import_module(f"tracker.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    special = [name for name in globals() if name.startswith("__")]
    return [*special, "__version__", "errors", "sync", *__all__]
