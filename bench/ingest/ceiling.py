"""`tracker serve` whose inbox answers at once and stores nothing: what the server itself can do.

Everything else is as deployed: the same process, route, signature check, parsing, metrics and
answers. What a callback costs beyond this is the price of storing and applying it.
"""

import asyncio

from tracker.cli import main
from tracker.core.record import Delivery, DeliveryOutcome
from tracker.receiving.receive import Inbox, Stored


def _store_nothing(_inbox: Inbox, delivery: Delivery) -> "asyncio.Future[Stored]":
    stored: asyncio.Future[Stored] = asyncio.get_running_loop().create_future()
    stored.set_result(Stored(delivery.delivery_id, DeliveryOutcome.WAITING, repeated=False))
    return stored


if __name__ == "__main__":
    assert Inbox.enqueue, "what the receiver calls"
    Inbox.enqueue = _store_nothing  # type: ignore[method-assign]
    main()
