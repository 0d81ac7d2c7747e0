"""Observations of one run, contradictory ones too, from small pools so that they collide often."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import strategies as st

from tracker.core.observation import Observation, Source
from tracker.core.run import Output, RunError, RunStatus, Status

START = datetime(2026, 6, 11, 12, tzinfo=UTC)

texts = st.sampled_from(["a", "b", "ü<script>"])
times = st.sampled_from([START, START + timedelta(milliseconds=123), START + timedelta(seconds=9)])
outputs = st.builds(
    Output,
    output_id=st.sampled_from(["output_1", "output_2"]),
    type=st.sampled_from(["imageUrl", "text"]),
    url=st.sampled_from(
        ["https://media.example/1.png", "https://media.example/1.png?sig=2", "//[", "words"]
    ),
)


_ENDS = (RunStatus.COMPLETED, RunStatus.FAILED)


def optional(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.none() | strategy


def observations(run_id: str = "run_1") -> st.SearchStrategy[Observation]:
    """Any observation: what a source shows of a run is independent of what is true."""

    def build(source: Source, status: Status, **seen: object) -> Observation:
        if source is Source.CALLBACK and status not in _ENDS:
            status = RunStatus.COMPLETED
        return Observation(run_id=run_id, source=source, status=status, **seen)  # type: ignore[arg-type]

    return st.builds(
        build,
        source=st.sampled_from(Source),
        status=st.sampled_from([*RunStatus, "cancelled", "queued"]),
        at=times,
        progress=optional(st.sampled_from([0.0, 40.0, 100.0])),
        run_type=optional(st.sampled_from(["technique", "generation"])),
        workspace_id=optional(texts),
        technique_id=optional(texts),
        technique_name=optional(texts),
        poll_url=optional(texts),
        created_at=optional(times),
        started_at=optional(times),
        completed_at=optional(times),
        charged_cost=optional(st.sampled_from([Decimal(0), Decimal("0.25"), Decimal("0.50")])),
        error=optional(st.builds(RunError, code=texts, message=texts)),
        outputs=optional(st.lists(outputs, max_size=2).map(tuple)),
        sent_at=optional(times),
    )
