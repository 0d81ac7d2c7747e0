"""`tracker serve` whose inbox answers at once and stores nothing: what the server itself can do.

Everything else is as deployed: the same process, route, signature check, parsing, metrics and
answers. What a callback costs beyond this is the price of storing and applying it.
"""

from tracker.cli import main
from tracker.core.record import Delivery, DeliveryOutcome
from tracker.store.writing.inbox import Inbox, Stored


async def _store_nothing(_inbox: Inbox, delivery: Delivery) -> Stored:
    return Stored(delivery.delivery_id, DeliveryOutcome.WAITING, repeated=False)


if __name__ == "__main__":
    Inbox.store = _store_nothing  # type: ignore[method-assign]
    main()
