"""`tracker doctor`: check a deployment from end to end."""

from typing import TYPE_CHECKING, Final

from tracker.cli.options import AS_JSON
from tracker.cli.output import console, plain, print_json
from tracker.core.errors import SettingsError
from tracker.core.formatting import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracker.operations.doctor import Finding

_COLOURS: Final = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_WIDTH: Final = 110
"""Maximum width: longer lines are hard to read, and cron's mail has no terminal."""


def doctor(as_json: bool = AS_JSON) -> int:
    """Check a deployment from end to end, and say what to fix.

    Run it with the settings of the service. It changes nothing: test deliveries are removed again.
    Exit status 1 if a check failed, 2 if the settings cannot be read. docs/doctor.md explains each
    line.
    """
    from tracker.operations.doctor import failed, worst

    status = 0
    try:
        findings = _examine()
    except SettingsError as error:
        advice = "Fix that setting; nothing else was checked."
        findings, status = [failed("settings", f"They cannot be read: {error}.", advice)], 2
    level = worst(findings)
    if as_json:
        print_json({"level": level.value, "findings": [_json(one) for one in findings]})
    else:
        _show(findings)
    return status or int(level.value == "failed")


def _examine() -> "Sequence[Finding]":
    from tracker.operations.doctor.examination import examine, run
    from tracker.operations.logs import configure_logs
    from tracker.settings import read_settings

    settings, sources, _, unknown = read_settings()
    configure_logs(
        format=settings.tracker_log_format,
        # The findings say what matters; level debug still logs everything.
        level="debug" if settings.tracker_log_level == "debug" else "critical",
        secrets=settings.secret_values,
    )
    return run(examine(settings, sources, unknown))


def _json(finding: "Finding") -> dict[str, str | None]:
    return {
        "name": finding.name,
        "level": finding.level.value,
        "workspace_id": finding.workspace,
        "seen": finding.seen,
        "advice": finding.advice or None,
    }


def _show(findings: "Sequence[Finding]") -> None:
    """Print a line for each finding, and below it what to do."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in findings:
        text = Text(plain(one.seen))
        if one.advice:
            text.append(f"\n→ {plain(one.advice)}", style="bold")
        name = one.name if one.workspace is None else f"{one.name}\n{one.workspace}"
        table.add_row(Text(one.level.value, style=_COLOURS[one.level.value]), Text(name), text)
    out = console()
    out.width = min(out.width, _WIDTH)
    out.print(table)
    out.print(f"\n{_summary(findings)}")


def _summary(findings: "Sequence[Finding]") -> str:
    counts = {level: sum(one.level.value == level for one in findings) for level in _COLOURS}
    warnings = counted(counts["warning"], "warning")
    return f"{counts['failed']} failed, {warnings}, {counts['ok']} ok."
