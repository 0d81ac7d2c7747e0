"""Inputs against a definition: what FLORA would refuse is named, and nothing else."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracker.core.errors import InvalidRequest
from tracker.core.starts import NOT_STARTABLE, STARTABLE, Port, check, obstacle, typed

FACE = Port(id="face", type="imageUrl", aspect_ratio="4:3")
LINK = "https://example.com/a.png"


def an_input(
    input_id: str = "face", type_: str | None = "imageUrl", value: Any = LINK
) -> dict[str, Any]:
    return {"id": input_id, "type": type_, "value": value}


def fields(ports: list[Port], *inputs: dict[str, Any]) -> list[str]:
    """The fields that are refused, in their order; each says what is wrong with it."""
    faults = check(ports, inputs)
    assert all(fault.message for fault in faults)
    return [fault.field for fault in faults]


def test_what_fits_has_no_fault() -> None:
    """Every needed input once, of its type, is fine; an optional one may be there or not."""
    ports = [FACE, Port(id="style", type="text", optional=True)]
    assert fields(ports, an_input()) == []
    assert fields(ports, an_input("style", "text", "noir"), an_input()) == []


def test_every_fault_is_named_at_once() -> None:
    """Unknown, missing, of the wrong type, empty, no link: one look finds them all."""
    ports = [FACE, Port(id="style", type="text"), Port(id="clip", type="videoUrl"), Port(id="seed")]
    faults = fields(
        ports,
        an_input("nose"),
        an_input("style", "imageUrl", ""),
        an_input("clip", "videoUrl", "ftp://example.com/a.mp4"),
        an_input("face", "text", "no link"),
    )
    assert faults == [
        "inputs.0.id",
        "inputs.1.type",
        "inputs.1.value",
        "inputs.2.value",
        "inputs.3.type",
        "inputs.3.value",
        "inputs.seed",
    ]


def test_an_unknown_input_is_reported_what_there_is() -> None:
    """The message names the technique's inputs."""
    (unknown, missing) = check([FACE], [an_input("nose")])
    assert "'nose'" in unknown.message
    assert "face" in unknown.message
    assert (missing.field, missing.message) == ("inputs.face", "is required (imageUrl, 4:3)")


def test_an_empty_definition_checks_nothing() -> None:
    """A catalogue that leaves its inputs out says nothing about them."""
    assert check([], [{"id": 5}, {}]) == []
    assert check([], []) == []


def test_one_input_at_least() -> None:
    """A start without any input is refused, even where each may be left out."""
    assert fields([Port(id="style", type="text", optional=True)]) == ["inputs"]
    assert fields([FACE]) == ["inputs.face"]


def test_twice_is_for_those_that_take_several() -> None:
    """A second value is refused unless the definition allows it."""
    assert fields([FACE], an_input(), an_input()) == ["inputs.1.id"]
    assert fields([Port(id="face", type="imageUrl", several=True)], an_input(), an_input()) == []


@pytest.mark.parametrize("type_", NOT_STARTABLE)
def test_sounds_and_documents_cannot_be_sent(type_: str) -> None:
    """An input that starts lack is refused with that reason, given or needed."""
    needed = Port(id="track", type=type_)
    for inputs in ([an_input()], [an_input(), an_input("track", "text")]):
        (fault,) = check([FACE, needed], inputs)
        assert fault.field.startswith("inputs.")
        assert "FLORA's starts take only text, imageUrl and videoUrl" in fault.message
        assert type_ in fault.message
    left_out = Port(id="track", type=type_, optional=True)
    assert fields([FACE, left_out], an_input()) == []
    assert fields([FACE, left_out], an_input(), an_input("track", type_)) == ["inputs.1.type"]


def test_a_technique_that_cannot_be_started_says_why() -> None:
    """Only what is needed and cannot be sent stands in the way."""
    track = Port(id="track", type="audioUrl")
    assert "track (audioUrl)" in (obstacle([FACE, track]) or "")
    assert obstacle([FACE, Port(id="track", type="audioUrl", optional=True)]) is None
    assert obstacle([]) is None


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (LINK, True),
        ("HTTPS://EXAMPLE.COM/a?b=c#d", True),
        ("http://127.0.0.1:8090/media/a.png", True),
        ("http://localhost/a.png", True),
        ("http://[::1]:80/a.png", True),
        ("http://example.com/a.png", False),
        ("//example.com/a.png", False),
        ("https://", False),
        ("https://[", False),
        ("https://example.com:port/", False),
        ("file:///etc/passwd", False),
        ("data:image/png;base64,AAAA", False),
        ("C:\\photo.png", False),
        ("a.png", False),
        ("", False),
        (None, False),
        (5, False),
    ],
)
def test_links_are_https(value: object, fits: bool) -> None:
    """A link is https; http is for this machine alone. A text may be anything but empty."""
    assert fields([FACE], an_input(value=value)) == ([] if fits else ["inputs.0.value"])
    text = Port(id="face", type="text")
    says_something = isinstance(value, str) and value != ""
    assert (fields([text], an_input("face", "text", value)) == []) is says_something


def test_an_optional_text_may_be_empty() -> None:
    """It is left out of the start; one that is needed, and a link, may not be. Something has to be
    said all the same."""
    style = Port(id="style", type="text", optional=True)
    empty = {"id": "style", "type": "text", "value": ""}
    assert fields([FACE, style], an_input(), empty) == []
    assert fields([style], empty) == ["inputs"]
    needed = Port(id="style", type="text")
    assert fields([FACE, needed], an_input(), empty) == ["inputs.1.value"]
    logo = Port(id="logo", type="imageUrl", optional=True)
    assert fields([FACE, logo], an_input(), an_input("logo", value="")) == ["inputs.1.value"]


def test_an_element_is_no_link() -> None:
    """Where FLORA takes the id of an element, that is fine, and a link is still looked at."""
    element = Port(id="face", type="imageUrl", element=True)
    assert fields([element], an_input(value="elem_123")) == []
    assert fields([element], an_input(value="http://example.com/a.png")) == ["inputs.0.value"]


def test_what_the_definition_leaves_open_is_not_checked() -> None:
    """A type that nobody has heard of, or none, takes whatever a start can bring."""
    for type_ in ("", "modelUrl"):
        port = Port(id="face", type=type_)
        assert fields([port], an_input("face", "text", "x")) == []
        assert fields([port], an_input()) == []
        assert fields([port], an_input("face", "modelUrl", "x")) == ["inputs.0.type"]


def test_no_message_repeats_a_value() -> None:
    """A link may carry a signature, and messages are logged."""
    value = "http://example.com/?token=secret"
    assert all("secret" not in fault.message for fault in check([FACE], [an_input(value=value)]))


def test_types_come_from_the_definition() -> None:
    """What was not given is filled in; what was given stays, and an unknown id is left to check."""
    some = [an_input(type_=None), an_input("face", "text", "x"), an_input("nose", None, "y")]
    assert typed([FACE], some) == [
        an_input(),
        an_input("face", "text", "x"),
        an_input("nose", "", "y"),
    ]
    assert typed([], [an_input("a", "text", "x")]) == [an_input("a", "text", "x")]
    with pytest.raises(InvalidRequest, match="the type has to be given") as refused:
        typed([], [an_input("a", "text", "x"), an_input("b", None, "y")])
    assert [fault.field for fault in refused.value.fields] == ["inputs.1.type"]


PORTS = st.lists(
    st.builds(
        Port,
        id=st.sampled_from("abcd"),
        type=st.sampled_from((*STARTABLE, *NOT_STARTABLE, "", "modelUrl")),
        optional=st.booleans(),
        several=st.booleans(),
        element=st.booleans(),
    ),
    max_size=4,
    unique_by=lambda port: port.id,
)
SCRAPS = st.none() | st.integers() | st.text() | st.sampled_from(("a", "b", "text", LINK))


@given(PORTS, st.lists(st.dictionaries(st.sampled_from(("id", "type", "value")), SCRAPS)))
def test_any_inputs_are_judged(ports: list[Port], inputs: list[dict[str, Any]]) -> None:
    """Whatever is given, the answer is a list of faults, each about something that was asked."""
    places = {f"inputs.{n}.{part}" for n in range(len(inputs)) for part in ("id", "type", "value")}
    places |= {f"inputs.{port.id}" for port in ports} | {"inputs"}
    assert {fault.field for fault in check(ports, inputs)} <= places


@given(PORTS)
def test_what_a_definition_asks_for_is_accepted(ports: list[Port]) -> None:
    """Inputs made from the definition have no fault, unless something needed cannot be sent."""
    inputs = [
        an_input(port.id, port.type if port.type in STARTABLE else "text", LINK)
        for port in ports
        if port.startable
    ]
    faults = check(ports, inputs)
    if obstacle(ports) is None:
        assert not [fault for fault in faults if fault.field != "inputs"]
        assert not faults or not inputs
    else:
        assert faults
