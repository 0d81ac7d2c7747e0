"""The techniques, as a list and alone."""

import pytest

from tests.simulator.conftest import Flora
from tracker.simulator import Options
from tracker.simulator.api import decode_cursor, encode_cursor
from tracker.simulator.catalogue import load_catalogue
from tracker.simulator.faults import ErrorAnswer

TYPES = {"imageUrl", "videoUrl", "audioUrl", "text", "documentUrl"}


async def test_the_catalogue_is_listed_in_pages(flora: Flora) -> None:
    """Following the cursor gives FLORA's 38 techniques, each once, without inputs and outputs."""
    listed, cursors, query = [], [], {"limit": "15"}
    while True:
        page = (await flora.get("/techniques", params=query)).raise_for_status().json()
        listed += page["techniques"]
        cursors.append(page["meta"]["next_cursor"])
        if cursors[-1] is None:
            break
        query["cursor"] = cursors[-1]
    assert len(cursors) == 3
    assert [item["technique_id"] for item in listed] == list(load_catalogue())
    assert len(listed) == 38
    assert listed[3]["technique_id"] == "tech_cctv-cam"
    assert listed[3]["name"] == "CCTV Cam"
    assert all(item["inputs"] == [] and item["outputs"] == [] for item in listed)


async def test_the_catalogue_is_searched(flora: Flora) -> None:
    """A query finds techniques by name or description, whatever the case."""
    found = (await flora.get("/techniques", params={"query": "TAROT"})).json()["techniques"]
    assert [item["technique_id"] for item in found] == ["tech_tarot-pull"]


@pytest.mark.parametrize("reference", ["tech_ugc-creation", "ugc-creation"])
async def test_a_technique_is_shown_with_its_inputs_and_outputs(
    flora: Flora, reference: str
) -> None:
    """Identifier and slug both show the full definition."""
    shown = (await flora.get(f"/techniques/{reference}")).raise_for_status().json()
    assert shown["technique_id"] == "tech_ugc-creation"
    assert shown["run_cost"] == 1.2
    assert [(port["id"], port["type"]) for port in shown["inputs"]] == [
        ("product", "imageUrl"),
        ("script", "text"),
    ]
    clip = shown["outputs"][0]
    assert (clip["specified_aspect_ratio"], clip["specified_duration"]) == ("9:16", 10)


async def test_an_unknown_technique_is_not_found(flora: Flora) -> None:
    """A technique that does not exist answers 404 in FLORA's shape."""
    answer = await flora.get("/techniques/tech_nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_catalogue_covers_all_kinds_of_inputs() -> None:
    """There is one that needs only text, an optional input, a link sent as text, a text output."""
    techniques = load_catalogue().values()
    assert all(0.05 <= technique.run_cost <= 1.2 for technique in techniques)
    assert all(technique.outputs and technique.inputs for technique in techniques)
    inputs = [port for technique in techniques for port in technique.inputs]
    outputs = [port for technique in techniques for port in technique.outputs]
    assert {port.type for port in inputs} == TYPES
    assert {port.type for port in outputs} == TYPES
    assert any({port.type for port in technique.inputs} == {"text"} for technique in techniques)
    assert any(port.optional for port in inputs)
    assert any(port.type == "documentUrl" and not port.optional for port in inputs)


def test_a_cursor_stands_for_an_offset() -> None:
    """The cursor is the one in FLORA's reference, and gives its offset back."""
    options = Options()
    assert encode_cursor(20, options, 0) == "eyJvZmZzZXQiOjIwfQ"
    assert all(
        decode_cursor(encode_cursor(offset, options, 0), options, 0) == offset
        for offset in (0, 7, 12345)
    )


@pytest.mark.parametrize("cursor", ["x", "€", "e30", "eyJvZmZzZXQiOi0xfQ", "bnVsbA", "W10"])
def test_a_foreign_cursor_is_refused(cursor: str) -> None:
    """An unknown cursor is bad input, never an offset."""
    with pytest.raises(ErrorAnswer) as caught:
        decode_cursor(cursor, Options(), 0)
    assert caught.value.status == 400


@pytest.mark.parametrize("limit", ["0", "101", "-1", "ten", "", "99999999"])
async def test_a_limit_out_of_range_is_refused(flora: Flora, limit: str) -> None:
    """Limits are 1 to 100."""
    for path in ("/techniques", "/technique-runs", "/generations"):
        answer = await flora.get(path, params={"limit": limit})
        assert answer.status_code == 400
        assert answer.json()["error"]["fields"][0]["field"] == "limit"
