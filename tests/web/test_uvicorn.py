"""`tracker.web.http.connection` and `tracker.web.http.server` build on internals of uvicorn."""

import hashlib
import inspect
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

ADVICE = """uvicorn has changed {what}. Before this digest (and the bound in pyproject.toml) moves:
- HttpToolsProtocol: `Connection` overrides connection_made, connection_lost, data_received,
  pause_writing, resume_writing, on_message_begin, on_header, on_headers_complete, on_body,
  on_message_complete, on_response_complete and _start_asgi_task, and uses scope, headers, url,
  cycle, pipeline, flow, parser, connections and server_state. See that each is still called when it
  was, that a request is queued in `pipeline` while another is answered, and that `scope` is new for
  each head.
- RequestResponseCycle: `_answer` does by itself what `send` does for an answer of status 200 with a
  length: response_started, response_complete, keep_alive, on_response; `body`, `more_body`,
  `disconnected` and `transport` are read or set. `_refuse` sends a line of STATUS_LINE.
- FlowControl: `_ReadFlow` refuses to resume; `write_paused` and both pauses mean the same.
- Server: `Server` overrides startup, shutdown, main_loop and capture_signals, and sets should_exit
  and force_exit.
Then run tests/web/test_network.py, test_prebuilt_response.py and
tests/hostile/test_memory.py, and measure bench.ingest before and after."""


@pytest.mark.parametrize(
    ("what", "digest"),
    [
        (HttpToolsProtocol, "18fdf324b11bf160"),
        (RequestResponseCycle, "e67d470d435dcc1c"),
        (FlowControl, "126debcdaa894c83"),
        (uvicorn.Server, "06e799f7c58f8be6"),
    ],
)
def test_what_the_connection_builds_on_is_as_it_was(what: type[Any], digest: str) -> None:
    """Where it is not, what to look at is said here."""
    found = hashlib.sha256(inspect.getsource(what).encode()).hexdigest()[:16]
    assert found == digest, ADVICE.format(what=what.__name__)
