"""The receiver one would write by hand: FastAPI, a SQLAlchemy session and a commit per callback.

It does what such receivers do, and does it properly: it checks the signature, validates the body
with a model, keeps the delivery, and brings the run's row up to date, before it answers. There is
no merge, no timeline and no schedule.
"""

import asyncio
import hashlib
import hmac
import os
import time
from datetime import UTC, datetime
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Header, HTTPException, Request
from pydantic import BaseModel
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The peer's own schema."""


class DeliveryRow(Base):
    """A callback as it came."""

    __tablename__ = "peer_deliveries"
    delivery_id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str]
    received_at: Mapped[str]
    body: Mapped[bytes]


class RunRow(Base):
    """A run and its state."""

    __tablename__ = "peer_runs"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    workspace_id: Mapped[str | None]
    status: Mapped[str]
    callback_at: Mapped[str]
    error_code: Mapped[str | None]


class Data(BaseModel):
    """`data` of a callback."""

    run_id: str
    run_type: str
    workspace_id: str | None = None
    status: str
    error_code: str | None = None


class Event(BaseModel):
    """A callback's body."""

    id: str
    type: str
    created_at: int
    data: Data


def build(url: str, secret: str) -> FastAPI:
    """The application, on an async database URL."""
    engine = create_async_engine(url, pool_size=20, max_overflow=0)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    application = FastAPI()
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine.sync_engine, "connect")
        def configure(connection: object, _: object) -> None:
            cursor = connection.cursor()  # type: ignore[attr-defined]
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

    def verified(header: str, body: bytes) -> bool:
        parts = dict(part.split("=", 1) for part in header.split(","))
        expected = hmac.new(
            secret.encode(), f"{parts['t']}.".encode() + body, hashlib.sha256
        ).hexdigest()
        return (
            hmac.compare_digest(expected, parts["v1"]) and abs(time.time() - int(parts["t"])) < 900
        )

    @application.post("/callbacks/flora")
    async def callback(
        request: Request, flora_signature: Annotated[str, Header()]
    ) -> dict[str, str]:
        body = await request.body()
        if not verified(flora_signature, body):
            raise HTTPException(401)
        event = Event.model_validate_json(body)
        now = datetime.now(UTC).isoformat()
        async with sessions() as session:
            if await session.get(DeliveryRow, event.id) is None:
                session.add(
                    DeliveryRow(
                        delivery_id=event.id, run_id=event.data.run_id, received_at=now, body=body
                    )
                )
                await _end(session, event, now)
                await session.commit()
        return {"outcome": "applied"}

    async def _end(session: AsyncSession, event: Event, now: str) -> None:
        run = await session.get(RunRow, event.data.run_id)
        if run is None:
            run = RunRow(run_id=event.data.run_id, workspace_id=event.data.workspace_id)
            session.add(run)
        run.status, run.callback_at = event.data.status, now
        run.error_code = event.data.error_code

    @application.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    application.state.engine = engine
    return application


async def _create(url: str) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()


if __name__ == "__main__":
    where = os.environ["PEER_DATABASE_URL"]
    asyncio.run(_create(where))
    uvicorn.run(
        build(where, os.environ["FLORA_WEBHOOK_SECRET"]),
        port=int(os.environ["PEER_PORT"]),
        access_log=False,
        log_level="warning",
    )
