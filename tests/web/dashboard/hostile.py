"""A run, a technique, a sweep and callbacks whose every text is somebody's attack."""

from decimal import Decimal
from typing import Final

from tracker.core.clock import utc_now
from tracker.core.entry import Delivered, Delivery, DeliveryOutcome, Seen, Unseen
from tracker.core.observation import Observation, Source
from tracker.core.run import Output, RunError, RunStatus
from tracker.store import sweeps, techniques
from tracker.store.techniques import TechniqueRow
from tracker.wiring import Services

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


async def attack(services: Services) -> None:
    """Store all of it, as if FLORA had said so."""
    now = utc_now()
    outputs = tuple(
        Output(f"{EVIL}{number}", kind, link)
        for number, (kind, link) in enumerate((kind, link) for kind in TYPES for link in LINKS)
    )
    of = {
        "run_id": RUN_ID,
        "at": now,
        "run_type": EVIL,
        "workspace_id": EVIL,
        "project_id": EVIL,
        "technique_id": TECHNIQUE_ID,
        "technique_name": EVIL,
        "poll_url": LINKS[0],
        "created_at": now,
    }
    inputs = [{"id": EVIL, "type": EVIL, "value": link} for link in (EVIL, *LINKS)]
    await services.door.put(
        Seen(observation=Observation(**of, source=Source.START), inputs=inputs)  # type: ignore[arg-type]
    )
    await services.door.put(Unseen(run_id=RUN_ID, at=now, error=EVIL))
    await services.door.put(
        Seen(
            observation=Observation(
                **of,  # type: ignore[arg-type]
                source=Source.POLL,
                status=RunStatus.FAILED,
                error=RunError(EVIL, EVIL),
                charged_cost=Decimal(1),
                outputs=outputs,
            )
        )
    )
    await services.door.put(Unseen(run_id=RUN_ID, at=now, error=EVIL))
    for number, outcome in enumerate(DeliveryOutcome):
        await services.door.put(
            Delivered(
                delivery=Delivery(
                    delivery_id=f"{DELIVERY_ID}{number}",
                    received_at=now,
                    body=f'{{"id": "{EVIL}"'.encode() + b"\xff\x00</pre>",
                    outcome=outcome,
                    run_id=RUN_ID,
                    event_type=EVIL,
                    api_version=EVIL,
                    workspace_id=EVIL,
                    reason=EVIL,
                )
            )
        )
    ports = (
        {"id": EVIL, "name": EVIL, "type": EVIL, "description": EVIL, "specified_duration": EVIL},
    )
    row = TechniqueRow(
        technique_id=TECHNIQUE_ID,
        name=EVIL,
        description=EVIL,
        slug=EVIL,
        inputs=ports,
        outputs=ports,
    )
    await techniques.define(services.database, row, now)
    number = await sweeps.begin(services.database, EVIL, now)
    await sweeps.finish(
        services.database, number, at=now, pages=1, items=1, discovered=0, repaired=0, error=EVIL
    )
