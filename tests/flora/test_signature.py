"""The signature of callbacks: FLORA's own verdicts, rotation, and headers made to hurt."""

import base64
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracker.flora.callback import SignatureError, sign, verify

CASES: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("signatures.json").read_text(encoding="utf-8")
)["cases"]
SECRET = "whsec_test_0123456789abcdef"
BODY = b'{"id":"whd_1"}'
AT = 1_750_000_000
NOW = datetime.fromtimestamp(AT, UTC)
GOOD = sign(BODY, SECRET, at=AT)
ARABIC = str(AT).translate({ord("0") + digit: 0x660 + digit for digit in range(10)})
V1 = GOOD.partition(",")[2]


def reason_of(header: str | bytes | None, secrets: list[str] | None = None) -> str:
    with pytest.raises(SignatureError) as caught:
        verify(header, BODY, [SECRET] if secrets is None else secrets, now=NOW, tolerance=900)
    return caught.value.reason


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
@pytest.mark.parametrize("form", [str, str.encode], ids=["text", "bytes"])
def test_official_verdicts(case: dict[str, Any], form: Any) -> None:
    """Every case gets the verdict of FLORA's official SDK, as text and as bytes."""
    try:
        verify(
            form(case["signature_header"]),
            base64.b64decode(case["body_base64"]),
            case["secrets"],
            now=datetime.fromtimestamp(case["now_s"], UTC),
            tolerance=case["tolerance_s"],
        )
        accepted = True
    except SignatureError:
        accepted = False
    assert accepted is case["accepted"]


def test_the_secret_that_matched_is_known() -> None:
    """The position of the matching secret is returned, wherever it stands."""
    secrets = ["whsec_a", SECRET, "whsec_b"]
    assert verify(GOOD, BODY, secrets, now=NOW, tolerance=900) == 1


@pytest.mark.parametrize("at", [AT, NOW], ids=["seconds", "datetime"])
def test_what_is_signed_verifies(at: int | datetime) -> None:
    """`sign` makes the header that `verify` accepts."""
    assert sign(BODY, SECRET, at=at) == GOOD
    assert verify(GOOD, BODY, [SECRET], now=NOW, tolerance=1) == 0


@pytest.mark.parametrize(
    "header",
    [
        f"t={AT}",
        V1,
        f"t={AT},v1=",
        f"t=,{V1}",
        f"t=-{AT},{V1}",
        f"t=+{AT},{V1}",
        f"t=1_750_000_000,{V1}",
        f"t={AT}.0,{V1}",
        f"t=0x684f0a00,{V1}",
        f"t={ARABIC},{V1}",
        f"t={'9' * 400},{V1}",
        f"T={AT},{V1}",
        ",,,===,v1",
        "\N{SNOWMAN}",
        b"\xff\xfe\x00",
    ],
)
def test_malformed(header: str | bytes) -> None:
    """Without a usable time and a signature a header is malformed, whatever else it holds."""
    assert reason_of(header) == "malformed"


@pytest.mark.parametrize("header", [None, "", b""])
def test_missing(header: str | bytes | None) -> None:
    """No header, or an empty one, is missing."""
    assert reason_of(header) == "missing"


@pytest.mark.parametrize(
    "header",
    [
        f"t={AT},v1={'0' * 64}",
        f"t={AT},{V1[:-1]}",
        f"t={AT},{V1}0",
        f"t={AT},{V1.upper().replace('V', 'v')}",
        f"t={AT},v1=\N{FULLWIDTH DIGIT ONE}",
        f"t={AT + 1},{V1}",
        f"t={AT},v0{V1[2:]},v1=none",
    ],
)
def test_mismatch(header: str) -> None:
    """A signature that differs in anything, letter case and length too, does not match."""
    assert reason_of(header) == "mismatch"


def test_an_empty_secret_matches_nothing() -> None:
    """What was signed with an empty key is refused, even where an empty secret is configured."""
    assert reason_of(sign(BODY, "", at=AT), ["", SECRET]) == "mismatch"
    assert reason_of(GOOD, []) == "mismatch"
    assert verify(GOOD, BODY, ["", SECRET], now=NOW, tolerance=900) == 1


def test_expired_is_said_only_of_what_flora_signed() -> None:
    """An old time is "expired" where the signature is right, and "mismatch" where it is not."""
    assert reason_of(sign(BODY, SECRET, at=AT - 901)) == "expired"
    assert reason_of(sign(BODY, SECRET, at=AT + 901)) == "expired"
    assert reason_of(sign(BODY, "whsec_other", at=AT - 901)) == "mismatch"


def test_of_several_times_the_last_counts() -> None:
    """As in FLORA's SDK, the last time that can be read is the one that was signed."""
    assert verify(f"t=1,{GOOD},t=x", BODY, [SECRET], now=NOW, tolerance=900) == 0
    assert reason_of(f"{GOOD},t=1") == "mismatch"


@pytest.mark.parametrize(
    "header",
    [
        "t=" + "1" * 1_000_000,
        GOOD + " " * 1_000_000,
        "," * 1_000_000,
        ("v1=" + "0" * 64 + ",") * 5_000 + GOOD,
        "x," * 1_500 + GOOD,
        "\N{SNOWMAN}" * 1_000_000,
        b"\x00" * 1_000_000,
    ],
    ids=["digits", "spaces", "commas", "signatures", "parts", "snowmen", "nul"],
)
def test_huge_headers_are_refused_quickly(header: str | bytes) -> None:
    """A header of a megabyte or of thousands of parts is refused before anything is computed."""
    began = time.process_time()
    assert reason_of(header) == "malformed"
    assert time.process_time() - began < 0.1


@given(header=st.text(st.characters(exclude_categories=())) | st.binary(), secret=st.text())
def test_only_its_own_error(header: str | bytes, secret: str) -> None:
    """No header, and no secret, makes anything but a `SignatureError`."""
    with pytest.raises(SignatureError):
        verify(header, BODY, [secret, "\ud800"], now=NOW, tolerance=900)


def test_errors_hold_no_secret() -> None:
    """Neither the secret nor the signature stands in an error."""
    with pytest.raises(SignatureError) as caught:
        verify(GOOD, b"other", [SECRET], now=NOW, tolerance=900)
    assert SECRET not in str(caught.value)
    assert V1[3:] not in str(caught.value)
