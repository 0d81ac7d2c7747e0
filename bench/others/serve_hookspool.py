"""hookspool's own command line, whose `/healthz` is asked for as `/readyz` too.

That is what the benchmarks ask a server whether it is ready. Callbacks go the way that they go in
a deployment, but for `TCP_NODELAY` where the benchmark asks for it.
"""

import os
import sys
from http.server import BaseHTTPRequestHandler

from hookspool.__main__ import main  # type: ignore[import-not-found]
from hookspool.intake import _Handler  # type: ignore[import-not-found]

_answer = _Handler.do_GET


def _answer_readyz_too(handler: BaseHTTPRequestHandler) -> None:
    if handler.path == "/readyz":
        handler.path = "/healthz"
    _answer(handler)


if __name__ == "__main__":
    _Handler.do_GET = _answer_readyz_too
    _Handler.disable_nagle_algorithm = bool(os.environ.get("BENCH_NO_DELAY"))
    sys.exit(main())
