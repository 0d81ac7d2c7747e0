"""A test delivery: what its answer, or that there is none, says of the way to the tracker."""

import socket
from contextlib import ExitStack

from tests.delivering.far_end import answer, far_end
from tracker.core.clock import utc_now
from tracker.operations.doctor.delivery import DoctorDelivery, diagnose, open_sender


async def test_an_address_that_takes_no_connection_is_not_called_slow() -> None:
    """As behind a firewall that drops packets: the tracker has not been reached."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # more than wait to be accepted, which nobody does
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/callbacks/flora"
        async with open_sender(url, timeout=5) as send:
            reply = await send(DoctorDelivery.forged(utc_now()))
    found = diagnose(reply)
    assert found.seen == "cannot be sent: there is no connection within 2.5 s"
    assert "firewall" in found.advice


async def test_a_wrong_clock_is_told_from_a_wrong_secret() -> None:
    """The tracker says `expired` to one who knows its secret."""
    body = b'{"error": {"code": "unauthorized", "message": "The signature is expired."}}'
    async with far_end(answer(body, "401 Unauthorized", x_request_id="1")) as far:
        url = f"http://127.0.0.1:{far.port}/callbacks/flora"
        async with open_sender(url, timeout=5) as send:
            found = diagnose(await send(DoctorDelivery.forged(utc_now())))
    assert "The signature is expired" in found.seen
    assert "The secret is right" in found.advice
