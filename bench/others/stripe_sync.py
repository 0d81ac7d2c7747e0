"""Stripe Sync Engine, Supabase's library in JavaScript that keeps Stripe's objects in PostgreSQL.

It is a library, so the smallest possible server in Node stands around it. It is sent
`product.created` with the whole product, a kind of event for which it asks Stripe nothing, signed
as Stripe does it, which is FLORA's own construction. For an event it

- writes one row, the product's, and leaves it where the row is of a later time than the event,
- keeps neither the event nor its id: there is no body to replay, and duplicates look alike,
- writes no timeline, no rollups and no schedule,
- reads a body of three times the size of FLORA's, because a product has more to say than a run,
- checks the signed time, as the tracker does.

Durability is PostgreSQL's: both have a server of their own, started alike with `fsync` on, and
neither touches `synchronous_commit`, which is on. The engine's pool has 20 connections, twice its
default, with which it is faster.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

from bench.ingest.contenders import Contender, Running
from bench.ingest.load import SECRET
from bench.ingest.rounds import count
from bench.others.installing import HERE, from_npm
from bench.ready import served
from bench.throw_away import throw_away
from tests.support.waiting import free_port
from tracker.flora.callback import sign

TABLE: Final = "stripe.products"
STRIPE_SYNC: Final = Contender("Stripe Sync Engine 0.48.5", "serve_stripe_sync.mjs", (), TABLE)


class StripeSync:
    """The engine behind a server in Node, on PostgreSQL."""

    name = STRIPE_SYNC.name
    kind = "postgresql"
    path = "/stripe"
    header = "Stripe-Signature"

    def install(self, into: Path) -> None:
        """The server goes along, because Node looks for packages beside who asks for them."""
        from_npm(HERE, into)
        shutil.copy(HERE / STRIPE_SYNC.module, into)

    def signed(self, count: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        """Events of products, each of one of its own."""
        now = int(time.time())
        for number in range(count):
            body = json.dumps(_event(f"{prefix}{number:08x}", now)).encode()
            yield sign(body, SECRET, at=now), body

    def storage(self) -> AbstractContextManager[str]:
        """A database on a server of its own."""
        return throw_away(self.kind)

    @contextmanager
    def started(self, installed: Path, storage: str, *, connections: int) -> Iterator[Running]:
        """It runs its migrations first. It takes any number of `connections`."""
        port = free_port()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "NODE_ENV": "production",
            "DATABASE_URL": storage,
            "STRIPE_WEBHOOK_SECRET": SECRET,
            "PORT": str(port),
        }
        command = ["node", str(installed / STRIPE_SYNC.module)]
        with served(command, port, environment) as process:
            yield Running(STRIPE_SYNC, port, process.pid)

    def kept(self, storage: str) -> int:
        """Its products, each of which is an event's."""
        return count(storage, TABLE)


def _event(key: str, now: int) -> dict[str, object]:
    product = {
        "id": f"prod_{key}",
        "object": "product",
        "active": True,
        "created": now,
        "default_price": None,
        "description": None,
        "images": [],
        "livemode": False,
        "marketing_features": [],
        "metadata": {},
        "name": f"Product {key}",
        "package_dimensions": None,
        "shippable": None,
        "statement_descriptor": None,
        "tax_code": None,
        "type": "service",
        "unit_label": None,
        "updated": now,
        "url": None,
    }
    return {
        "id": f"evt_{key}",
        "object": "event",
        "api_version": "2020-08-27",
        "created": now,
        "data": {"object": product},
        "livemode": False,
        "pending_webhooks": 1,
        "request": {"id": None, "idempotency_key": None},
        "type": "product.created",
    }
