"""Requests that go wrong: rate limits, server errors, and connections that are cut."""

from collections import Counter
from email.utils import parsedate_to_datetime

import httpx
import pytest

from tests.simulator.conftest import MakeFlora
from tests.support.clocks import HandClock
from tracker.simulator import Options, parse_rate, running
from tracker.simulator.faults import RequestFault

START = {"inputs": [{"id": "prompt", "type": "text", "value": "tools"}], "mode": "async"}


@pytest.mark.parametrize(
    ("text", "rate"),
    [("0.4", 0.4), ("40%", 0.4), (" 1 ", 1), ("0", 0), ("100%", 1), ("2.5%", 0.025)],
)
def test_a_share_is_a_number_or_a_percentage(text: str, rate: float) -> None:
    """Rates are written 0 to 1, or with a per cent sign."""
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "x", "-0.1", "1.1", "101%", "nan", "40"])
def test_an_invalid_share_is_refused(text: str) -> None:
    """Everything outside 0 to 1 is an error that describes valid values."""
    with pytest.raises(ValueError, match="share"):
        parse_rate(text)


@pytest.mark.parametrize(
    "values",
    [
        {"drop": 1.5},
        {"speed": 0},
        {"run_seconds": float("inf")},
        {"idempotency": "never"},
        {"time_unit": "min"},
        {"retry_after": -1},
        {"webhook_secret": " "},
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, object]) -> None:
    """An invalid value is an error that names the option."""
    with pytest.raises(ValueError, match=next(iter(values))):
        Options(**values)  # type: ignore[arg-type]


def test_secrets_are_not_part_of_the_options_text() -> None:
    """The `repr` of the options contains neither key nor signing secret."""
    shown = repr(Options(api_key="sk_hidden", webhook_secret="whsec_hidden"))
    assert "hidden" not in shown


@pytest.mark.parametrize("rate", ["rate_limit", "errors", "cut"])
def test_faults_occur_at_their_rate_and_repeatably(rate: str) -> None:
    """About the configured share of requests has a fault, the same ones for the same seed."""
    options = Options(**{rate: 0.3})  # type: ignore[arg-type]
    struck = [RequestFault(options, number).name for number in range(1000)]
    assert 240 <= sum(fault is not None for fault in struck) <= 360
    assert struck == [RequestFault(options, number).name for number in range(1000)]
    assert struck != [RequestFault(Options(seed=1, **{rate: 0.3}), n).name for n in range(1000)]  # type: ignore[arg-type]


async def test_a_429_has_three_forms_of_retry_after(
    make_flora: MakeFlora, clock: HandClock
) -> None:
    """Half of the 429s name seconds, a quarter a date that is not too early, a quarter nothing."""
    flora = make_flora(rate_limit=1, retry_after=3)
    styles: Counter[str] = Counter()
    for _ in range(200):
        answer = await flora.get("/techniques")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")
        assert answer.headers["request-id"].startswith("req_")
        after = answer.headers.get("retry-after")
        if after is None:
            styles["absent"] += 1
        elif after == "3":
            styles["seconds"] += 1
        else:
            left = (parsedate_to_datetime(after) - clock()).total_seconds()
            assert 3 <= left <= 4
            styles["date"] += 1
    assert 75 <= styles["seconds"] <= 125
    assert 30 <= styles["date"] <= 70
    assert 30 <= styles["absent"] <= 70
    assert flora.world.counts["techniques.list", 429] == 200


async def test_server_errors_are_of_both_kinds_and_not_always_json(make_flora: MakeFlora) -> None:
    """A failing server answers 500 and 503, sometimes with a body that is no JSON; nothing runs."""
    flora = make_flora(errors=1)
    kinds = set()
    for _ in range(60):
        answer = await flora.start()
        try:
            kinds.add((answer.status_code, answer.json()["error"]["code"]))
        except ValueError:
            kinds.add((answer.status_code, "no JSON"))
    assert kinds == {
        (500, "internal_error"),
        (500, "unknown_error"),
        (500, "no JSON"),
        (503, "service_unavailable"),
        (503, "no JSON"),
    }
    assert flora.world.runs == {}


async def test_a_cut_connection_looks_cut_to_the_client() -> None:
    """Every cut is a transport error; some come before the run was started, some after."""
    async with running(Options(cut=1)) as simulator:
        headers = {"Authorization": "Bearer sk_test_simulator"}
        async with httpx.AsyncClient(base_url=simulator.base_url, headers=headers) as client:
            started = []
            for _ in range(24):
                with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                    await client.post("/techniques/icon-pack/runs", json=START)
                started.append(len(simulator.world.runs))
        assert simulator.world.counts == {("runs.start", 0): 24}
    assert 0 < started[-1] < 24


async def test_after_a_cut_the_key_finds_the_run() -> None:
    """The answer of a lost start is repeated for its key, and it runs once."""
    async with running(Options(cut=0.5, failures=0)) as simulator:
        headers = {"Authorization": "Bearer sk_test_simulator"}
        async with httpx.AsyncClient(base_url=simulator.base_url, headers=headers) as client:
            for number in range(20):
                body = START | {"idempotency_key": f"key {number}"}
                answer = None
                while answer is None:
                    try:
                        answer = await client.post("/techniques/icon-pack/runs", json=body)
                    except (httpx.RemoteProtocolError, httpx.ReadError):
                        continue
                assert answer.json()["run_id"] == list(simulator.world.runs)[-1]
        assert len(simulator.world.runs) == 20
        assert simulator.world.counts["runs.start", 0] > 0
