"""A run, a technique, a sweep, a batch and callbacks in which every text is an attack."""

from datetime import timedelta
from decimal import Decimal
from typing import Final

from tests.support.deliveries import Delivered, keep
from tests.support.started import of_start
from tests.support.webhooks import add_endpoint, add_message
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Delivery, DeliveryOutcome, FailedRead, Observed
from tracker.core.run import Output, RunError, RunStatus
from tracker.services import Services
from tracker.store.engine import dump_json
from tracker.store.queries import batches, starts, sweeps, techniques
from tracker.store.queries.audit import Principal, acting
from tracker.store.queries.batches import BatchEntry, BatchRow
from tracker.store.queries.starts import StartState
from tracker.store.queries.techniques import TechniqueRow

MARK: Final = "attacked"
EVIL: Final = (
    f"\"'><script>alert('{MARK}')</script><img src=x onerror=alert('{MARK}')>"
    f"</textarea></title>{{{{ 7*7 }}}}<a href=javascript:alert('{MARK}')>&lt;b&gt;"
)
LINKS: Final = (
    f"javascript:alert('{MARK}')",
    f"JaVaScRiPt:alert('{MARK}')",
    f" javascript:alert('{MARK}')",
    f"java\tscript:alert('{MARK}')",
    f"data:text/html,<script>alert('{MARK}')</script>",
    f"vbscript:msgbox('{MARK}')",
    "file:///etc/passwd",
    "https://user:pass@example.com/x.png",
    "https://example.com\\@evil.example/x.png",
    f"https://example.com/\"onerror=alert('{MARK}')",
    "//evil.example/x.png",
    "https:///x.png",
    "",
)
TYPES: Final = ("imageUrl", "videoUrl", "audioUrl", "documentUrl", "text", EVIL)
RUN_ID: Final = f"run_{EVIL}"
DELIVERY_ID: Final = f"whd_{EVIL}"
TECHNIQUE_ID: Final = f"tech_{EVIL}"
BATCH_ID: Final = f"batch_{EVIL}"
ENDPOINT_ID: Final = f"shop_{EVIL}"
MESSAGE_ID: Final = f"msg_{EVIL}"


async def attack(services: Services, evil: str = EVIL) -> None:
    """Store all of it, as if it came from FLORA."""
    run_id, technique_id = f"run_{evil}", f"tech_{evil}"
    now = utc_now()
    outputs = tuple(
        Output(f"{evil}{number}", kind, link)
        for number, (kind, link) in enumerate((kind, link) for kind in TYPES for link in LINKS)
    )
    of = {
        "run_id": run_id,
        "at": now,
        "run_type": evil,
        "workspace_id": evil,
        "project_id": evil,
        "technique_id": technique_id,
        "technique_name": evil,
        "poll_url": LINKS[0],
        "created_at": now,
    }
    inputs = [{"id": evil, "type": evil, "value": link} for link in (evil, *LINKS)]
    await services.writer.submit(
        of_start(
            Observed(observation=Observation(**of, source=Source.START)),  # type: ignore[arg-type]
            inputs=inputs,
            tags={evil: evil},
        )
    )
    await services.writer.submit(FailedRead(run_id=run_id, at=now, error=evil))
    await services.writer.submit(
        Observed(
            observation=Observation(
                **of,  # type: ignore[arg-type]
                source=Source.POLL,
                status=RunStatus.FAILED,
                error=RunError(evil, evil),
                charged_cost=Decimal(1),
                outputs=outputs,
            )
        )
    )
    await services.writer.submit(FailedRead(run_id=run_id, at=now, error=evil))
    disagreeing = Observation(
        run_id=run_id, at=now, source=Source.CALLBACK, status=RunStatus.COMPLETED
    )
    await services.writer.submit(Observed(observation=disagreeing))
    for number, outcome in enumerate(DeliveryOutcome):
        await keep(
            services.database,
            Delivered(
                delivery=Delivery(
                    delivery_id=f"whd_{evil}{number}",
                    received_at=now,
                    body=f'{{"id": "{evil}"'.encode() + b"\xff\x00</pre>",
                    run_id=run_id,
                    event_type=evil,
                    api_version=evil,
                    workspace_id=evil,
                ),
                outcome=outcome,
                reason=evil,
            ),
        )
    ports = (
        {"id": evil, "name": evil, "type": evil, "description": evil, "specified_duration": evil},
    )
    row = TechniqueRow(
        technique_id=technique_id,
        name=evil,
        description=evil,
        slug=evil,
        inputs=ports,
        outputs=ports,
    )
    await techniques.define(services.database, row, now)
    number = await sweeps.begin(services.database, evil, now)
    await sweeps.finish(
        services.database, number, at=now, pages=1, items=1, discovered=0, repaired=0, error=evil
    )
    await _attack_batch(services, evil)
    await _attack_webhooks(services, evil)


async def _attack_webhooks(services: Services, evil: str) -> None:
    """An endpoint with such a name and errors, and a message that it answered so."""
    now, texts = utc_now(), {"last_error": evil, "run_id": f"run_{evil}"}
    await add_endpoint(
        services.database,
        f"shop_{evil}",
        url=f"https://shop.example.com/{evil}",
        filters={"tag": f"{evil}={evil}"},
        state="disabled",
        disabled_at=now,
        disabled_reason=evil,
        failing_since=now,
        last_error_at=now,
        last_error=evil,
    )
    await add_message(
        services.database,
        f"msg_{evil}",
        f"shop_{evil}",
        500,
        body=dump_json({"type": evil, "data": evil}),
        answer=evil,
        **texts,
    )


async def _attack_batch(services: Services, evil: str) -> None:
    """A sheet with such a name, whose row FLORA refused in such words."""
    now, row = utc_now(), BatchEntry(position=1, line=2, digest="0" * 64)
    batch = BatchRow(
        batch_id=f"batch_{evil}",
        workspace_id="default",
        technique_id=f"tech_{evil}",
        name=f"{evil}.csv",
        created_at=now,
    )
    await batches.keep(services.database, batch, [row])
    with acting(Principal(name=evil, address=evil, request_id=evil)):
        await starts.reserve(
            services.database,
            starts.StartRow(
                workspace_id="default",
                idempotency_key=row.key,
                technique_id=f"tech_{evil}",
                fingerprint="0",
                inputs=[{"id": evil, "type": evil, "value": evil}],
                created_at=now,
            ),
        )
    await starts.take(services.database, "default", row.key, "tests", now, timedelta(minutes=1))
    refusal = {
        "status": 400,
        "code": evil,
        "message": evil,
        "fields": [{"field": evil, "message": evil}],
    }
    await starts.mark(
        services.database,
        "default",
        row.key,
        holder="tests",
        state=StartState.REFUSED,
        error=refusal,
    )
