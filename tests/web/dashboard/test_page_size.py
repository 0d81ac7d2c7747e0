"""No page is larger than 2 MB, whatever other people put into it."""

import json

import pytest

from tests.support.started import of_start
from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Site
from tests.web.dashboard.conftest import HTML
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.core.run import Output, RunError, RunStatus
from tracker.web.dashboard.render import PAGE_BYTES, indented, indented_json

QUOTES = 20_000 * "\"'<&>"  # each becomes five characters


async def test_a_run_full_of_long_texts_has_a_page(small_site: Site) -> None:
    """Outputs, inputs, errors, events and callbacks are cut, and marked as cut."""
    of = {"run_id": "run_long", "workspace_id": "ws_1", "technique_id": "tech_1"}
    inputs = [{"id": f"i{n}", "type": "text", "value": QUOTES} for n in range(20)]
    seen = Observation(**of, at=utc_now(), source=Source.START)  # type: ignore[arg-type]
    await small_site.services.writer.submit(of_start(Observed(observation=seen), inputs=inputs))
    outputs = tuple(Output(f"o{n}", "text", QUOTES) for n in range(40))
    for end in (RunStatus.FAILED, RunStatus.COMPLETED):
        seen = Observation(
            **of,  # type: ignore[arg-type]
            at=utc_now(),
            source=Source.POLL,
            status=end,
            error=RunError("code", QUOTES) if end is RunStatus.FAILED else None,
            technique_name=QUOTES,
            outputs=outputs,
        )
        await small_site.services.writer.submit(Observed(observation=seen))
    for number in range(10):
        body = event("run_long", id=f"whd_{number}", padding=45_000 * "'\\<")
        answer = await small_site.client.post(PATH, content=body, headers=signed(body))
        assert answer.status_code == 200
    await small_site.services.applier.drain()
    for path in ("/runs/run_long", "/runs", "/deliveries/whd_3", "/"):
        page = await small_site.client.get(path, headers=HTML)
        assert page.status_code == 200
        assert 1000 < len(page.content) < PAGE_BYTES
    page = await small_site.client.get("/runs/run_long", headers=HTML)
    assert "100,000 characters, cut here" in page.text
    assert page.text.endswith("</html>")


@pytest.mark.parametrize(
    ("body", "formatted"),
    [
        (b'{"a": [1]}', True),
        (b"[" * 32 + b"]" * 32, True),
        (b"[" * 33 + b"]" * 33, False),
        (b'{"a":' * 33 + b"1" + b"}" * 33, False),
        (b"[" * 8000 + b"]" * 8000, False),
        (b'"' + 16_382 * b"a" + b'"', True),
        (b'"' + 16_383 * b"a" + b'"', False),
        (b"no JSON", False),
    ],
)
def test_small_and_flat_json_is_indented(body: bytes, formatted: bool) -> None:
    """JSON up to 16 KiB and 32 levels is indented; any other body is not."""
    assert (indented_json(body) is not None) is formatted
    if formatted:
        assert json.loads(indented(json.loads(body))) == json.loads(body)


def test_a_deep_observation_is_one_line() -> None:
    """Indentation would multiply it."""
    deep: list[object] = [list(range(5))]
    for _ in range(40):
        deep = [deep]
    assert "\n" not in indented(deep)
    assert "\n" in indented(deep[0][0][0][0][0][0][0][0][0][0])  # type: ignore[index]
