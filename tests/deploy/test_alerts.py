"""The alerts: each fires when it should and says what to do; where all is well they are quiet."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import ROOT, Promtool, names_in
from tests.support.shares import share_of

RULES = ROOT / "deploy/prometheus/alerts.yml"
DOCS_ROOT = "https://docs.example.com/flora-run-tracker"
MINUTES = 120
"""Each scenario is looked at then; its series have a sample a minute."""

Series = dict[str, str | None]


def on(metric: str, value: str, *, labels: str = "", instances: str = "ab") -> Series:
    """The same series from several processes; `value` is what promtool reads."""
    more = f", {labels}" if labels else ""
    return {f'{metric}{{instance="{one}"{more}}}': f"{value}x{MINUTES + 10}" for one in instances}


WS = 'workspace_id="ws_1"'
SHOP = 'endpoint_id="shop"'
BUDGET = 'budget="day:workspace_id=ws_1"'
RECENT = "tracker_recent_callbacks"
LAST_CALLBACK = "tracker_callback_last_received_timestamp_seconds"
LAST_SWEEP = "tracker_sweep_last_complete_timestamp_seconds"
LAST_ROUND = "tracker_worker_last_round_timestamp_seconds"
REFUSED = "tracker_callbacks_refused_total"
TAKEN = "tracker_callbacks_total"
FAILURES = "tracker_database_write_failures_total"
COMMITS = "tracker_commit_seconds_bucket"
TAKEN_LABELS = f'{WS}, secret="1", outcome="stored"'

# Two processes, "a" with a worker; what both tell of the database must not count twice.
HEALTHY: Series = {
    **on("up", "1", labels='job="flora-run-tracker"'),
    **on("tracker_build_info", "1", labels='version="1"'),
    **on("tracker_settings_stale", "0"),
    **on("tracker_worker_running", "1", instances="a"),
    **on("tracker_worker_running", "0", instances="b"),
    **on(LAST_ROUND, "0+60", instances="a"),
    **on(LAST_ROUND, "0", instances="b"),
    **on("tracker_recent_callback_miss_ratio", "0.05", labels=WS),
    **on(RECENT, "9", labels=f'{WS}, outcome="came"'),
    **on(RECENT, "0", labels=f'{WS}, outcome="missed"'),
    **on(LAST_CALLBACK, "0+60"),
    **on("tracker_runs_awaiting_callback", "3"),
    **on(REFUSED, "0+1", labels='reason="mismatch"'),  # unsigned or forged
    **on(REFUSED, "0", labels='reason="not_set_up"'),
    **on(TAKEN, "0+5", labels=TAKEN_LABELS),
    **on("tracker_deliveries_quarantined", "0"),
    **on("tracker_inbox_oldest_seconds", "0.2"),
    **on("tracker_flora_breaker_open", "0", labels=WS),
    **on("tracker_flora_up", "1", labels=WS),
    **on("tracker_flora_misconfigured", "0", labels=WS),
    **on(LAST_SWEEP, "0+60", labels=WS),
    **on("tracker_sweep_interval_seconds", "300"),
    **on("tracker_sweep_failed", "0", labels=WS),
    **on("tracker_endpoint_disabled", "0", labels=SHOP),
    **on("tracker_messages_oldest_pending_seconds", "60", labels=SHOP),
    **on("tracker_history_gaps", "0", labels=f'{WS}, run_type="technique"'),
    **on("tracker_runs_due", "2"),
    **on("tracker_runs_overdue", "0"),
    **on("tracker_starts_unresolved", "0"),
    **on("tracker_callback_own_addresses_missing", "0"),
    **on("tracker_runs_unpriced", "0", labels=WS),
    **on("tracker_budget_usd", "10", labels=BUDGET),
    **on("tracker_budget_used_usd", "4", labels=f'{BUDGET}, part="charged"'),
    **on("tracker_budget_used_usd", "3", labels=f'{BUDGET}, part="quoted"'),
    **on("tracker_starts_over_budget_total", "0", labels=BUDGET),
    **on("tracker_database_up", "1"),
    **on(FAILURES, "0", labels='reason="unavailable"'),
    **on(COMMITS, "0+10", labels='le="0.1"'),
    **on(COMMITS, "0+10", labels='le="+Inf"'),
    **on("tracker_state_read_seconds", "0.01"),
}
STATE = (
    *("tracker_recent", "tracker_callback_last", "tracker_callback_own", "tracker_runs"),
    *("tracker_deliveries", "tracker_inbox", "tracker_sweep_last", "tracker_sweep_failed"),
    "tracker_history_gaps",
    *("tracker_starts", "tracker_endpoint", "tracker_messages"),
)


def without(*prefixes: str) -> Series:
    """Nothing of these is told any more."""
    return {name: None for name in HEALTHY if name.startswith(prefixes)}


MISSES = {
    **on("tracker_recent_callback_miss_ratio", "0.5", labels=WS),
    **on(RECENT, "5", labels=f'{WS}, outcome="missed"'),
}
SCENARIOS: dict[str, tuple[Series, set[str]]] = {
    "all is well": ({}, set()),
    "nothing is scraped": (without("tracker", "up"), {"TrackerDown", "TrackerWorkerAbsent"}),
    "the worker's process is gone": (
        {name: None for name in HEALTHY if 'instance="a"' in name},
        {"TrackerWorkerAbsent"},
    ),
    "the worker's process runs without a worker": (
        on("tracker_worker_running", "0"),
        {"TrackerWorkerAbsent"},
    ),
    "the worker hangs": (on(LAST_ROUND, "60", instances="a"), {"TrackerWorkerStuck"}),
    "one of two workers hangs": (
        on("tracker_worker_running", "1") | on(LAST_ROUND, "60", instances="b"),
        {"TrackerWorkerStuck"},
    ),
    "one process does not answer": (
        {name: None for name in HEALTHY if 'instance="b"' in name}
        | on("up", "0", labels='job="flora-run-tracker"', instances="b"),
        {"TrackerProcessDown"},
    ),
    "a secret's file was emptied": (
        on("tracker_settings_stale", "1", instances="b"),
        {"TrackerSettingsStale"},
    ),
    "no key is set, so that nothing is polled": (on(LAST_ROUND, "0"), set()),
    "half of the callbacks are missed": (MISSES, {"TrackerCallbacksMissed"}),
    "half of very few callbacks are missed": (
        MISSES | on(RECENT, "4", labels=f'{WS}, outcome="came"'),
        set(),
    ),
    "nothing has come for long": (on(LAST_CALLBACK, "2000"), {"TrackerNoCallbacks"}),
    "nothing ever came": (on(LAST_CALLBACK, "0"), {"TrackerNoCallbacks"}),
    "nothing has come, and no run waits": (
        on(LAST_CALLBACK, "2000") | on("tracker_runs_awaiting_callback", "0"),
        set(),
    ),
    "the secret is wrong": (on(TAKEN, "7", labels=TAKEN_LABELS), {"TrackerCallbacksRefused"}),
    "the secret of one workspace is wrong": (
        on(TAKEN, "7", labels=TAKEN_LABELS.replace("ws_1", "ws_2"))
        | on(RECENT, "3", labels='workspace_id="ws_2", outcome="missed"'),
        {"TrackerCallbacksRefused"},
    ),
    "no secret is set": (
        without(TAKEN) | on(REFUSED, "0+1", labels='reason="not_set_up"'),
        {"TrackerCallbacksRefused"},
    ),
    "a proxy passes on the exact path alone": (
        on("tracker_callback_own_addresses_missing", "1"),
        {"TrackerCallbackAddresses"},
    ),
    "a callback was not understood": (
        on("tracker_deliveries_quarantined", "1"),
        {"TrackerQuarantine"},
    ),
    "nobody applies what is stored": (
        on("tracker_inbox_oldest_seconds", "60+60"),
        {"TrackerInboxBehind"},
    ),
    "a burst is applied within minutes": (
        {'tracker_inbox_oldest_seconds{instance="a"}': "0x100 60 120 180 0x30"},
        set(),
    ),
    "the key is refused": (
        on("tracker_flora_breaker_open", "1", labels=WS, instances="a"),
        {"TrackerKeyRefused"},
    ),
    "FLORA does not answer": (
        on("tracker_flora_up", "0", labels=WS, instances="a"),
        {"TrackerFloraUnreachable"},
    ),
    "the base URL leads elsewhere": (
        on("tracker_flora_up", "0", labels=WS) | on("tracker_flora_misconfigured", "1", labels=WS),
        {"TrackerFloraMisconfigured"},
    ),
    "sweeps have stopped": (on(LAST_SWEEP, "4000", labels=WS), {"TrackerSweepLate"}),
    "a workspace was never swept": (on(LAST_SWEEP, "0", labels=WS), {"TrackerSweepLate"}),
    "sweeps are made twice a day": (
        on(LAST_SWEEP, "4000", labels=WS) | on("tracker_sweep_interval_seconds", "43200"),
        set(),
    ),
    "part of the history cannot be read": (
        on("tracker_history_gaps", "1", labels=f'{WS}, run_type="technique"'),
        {"TrackerHistoryGap"},
    ),
    "sweeps fail": (on("tracker_sweep_failed", "1", labels=WS), {"TrackerSweepFailing"}),
    "sweeps fail, and now and then one is under way": (
        {f'tracker_sweep_failed{{instance="a", {WS}}}': "1 1 0 1 1 " * 30},
        {"TrackerSweepFailing"},
    ),
    "polling does not keep up": (on("tracker_runs_overdue", "40"), {"TrackerRunsOverdue"}),
    "a start has become unresolved": (
        {'tracker_starts_unresolved{instance="a"}': "1x60 2x70"},
        {"TrackerStartsUnresolved"},
    ),
    "four fifths of a budget are used": (
        on("tracker_budget_used_usd", "5", labels=f'{BUDGET}, part="charged"'),
        {"TrackerBudgetNearlyUsed"},
    ),
    "a budget is passed by bills": (
        on("tracker_budget_used_usd", "9", labels=f'{BUDGET}, part="charged"'),
        {"TrackerBudgetNearlyUsed", "TrackerBudgetUsed"},
    ),
    "a start does not fit what is left": (
        on("tracker_starts_over_budget_total", "0+1", labels=BUDGET, instances="a"),
        {"TrackerBudgetUsed"},
    ),
    "starts have been unresolved for days": (on("tracker_starts_unresolved", "2"), set()),
    "runs are never billed": (
        on("tracker_runs_unpriced", "2", labels=WS),
        {"TrackerRunsUnpriced"},
    ),
    "an endpoint is disabled, and its messages wait": (
        on("tracker_endpoint_disabled", "1", labels=SHOP)
        | on("tracker_messages_oldest_pending_seconds", "9000", labels=SHOP),
        {"TrackerEndpointDisabled"},
    ),
    "an endpoint has failed for hours": (
        on("tracker_messages_oldest_pending_seconds", "9000", labels=SHOP),
        {"TrackerMessagesLate"},
    ),
    "one process has lost the database": (
        on("tracker_database_up", "0", instances="b"),
        {"TrackerDatabaseDown"},
    ),
    "the database is down": (
        without(*STATE)
        | on("tracker_database_up", "0")
        | on(FAILURES, "0+30", labels='reason="unavailable"'),
        {"TrackerDatabaseDown", "TrackerStateUnknown", "TrackerCommitFailing"},
    ),
    "commits are slow": (
        on(COMMITS, "0", labels='le="0.1"')
        | on(COMMITS, "0+10", labels='le="2.5"')
        | on(COMMITS, "0+10", labels='le="+Inf"'),
        {"TrackerDatabaseSlow"},
    ),
    "reads are slow": (on("tracker_state_read_seconds", "3"), {"TrackerDatabaseSlow"}),
}


def rules() -> list[dict[str, Any]]:
    """All alert rules."""
    return [one for group in yaml.safe_load(RULES.read_text())["groups"] for one in group["rules"]]


def test_the_rules_and_the_example_are_valid(promtool: Promtool) -> None:
    """Prometheus itself says so."""
    promtool("check", "rules", "--lint-fatal", RULES)
    promtool("check", "config", "--syntax-only", ROOT / "deploy/prometheus/prometheus.yml")


def test_each_alert_fires_when_it_should_and_no_other(
    promtool: Promtool, tmp_path: Path, thorough: bool
) -> None:
    """In each scenario, the absence of all data and of a process's data included."""
    tests = []
    for name, (changes, expected) in share_of([*SCENARIOS.items()], of=3, thorough=thorough):
        series = {key: value for key, value in (HEALTHY | changes).items() if value is not None}
        tests.append(
            {
                "name": name,
                "interval": "1m",
                "input_series": [{"series": key, "values": v} for key, v in series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": f"{MINUTES}m",
                        "exp_samples": [
                            {"labels": f'{{alertname="{alert}"}}', "value": 1}
                            for alert in sorted(expected)
                        ],
                    }
                ],
            }
        )
    # The series are two hours long: a window of three hours sees what one of three days sees, and
    # Prometheus reads it at 36 times instead of 864, for each minute of each scenario.
    assert "[3d:5m]" in RULES.read_text()
    quick = tmp_path / "alerts.yml"
    quick.write_text(RULES.read_text().replace("[3d:5m]", "[3h:5m]"))
    file = tmp_path / "alerts.test.yml"
    suite = {"rule_files": [str(quick)], "evaluation_interval": "5m", "tests": tests}
    file.write_text(json.dumps(suite))
    promtool("test", "rules", file)


def test_each_alert_has_a_scenario() -> None:
    """None is there that was never seen to fire."""
    seen = set().union(*(expected for _, expected in SCENARIOS.values()))
    assert {rule["alert"] for rule in rules()} == seen


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_each_alert_says_what_it_means_and_where_to_look(rule: dict[str, Any]) -> None:
    """A summary, a description, a severity, and a section of the runbook."""
    assert rule["labels"].keys() == {"severity"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert page == f"{DOCS_ROOT}/runbook.html"
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert rule["alert"] in headings
    assert anchor == rule["alert"].lower()
    # The command of docs/metrics.md gives every rule the operator's own root.
    assert f"s|{DOCS_ROOT}|" in (ROOT / "docs/metrics.md").read_text()


def test_the_runbook_has_no_section_too_many() -> None:
    """Nor does it describe an alert that is gone."""
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in rules()]


def test_alerts_ask_only_for_metrics_that_there_are(series: set[str]) -> None:
    """A renamed metric would make an alert silent."""
    for rule in rules():
        names = names_in(rule["expr"])
        assert names or rule["expr"].startswith("up{"), rule["alert"]  # that is Prometheus's own
        assert names <= series, rule["alert"]
    assert {name.partition("{")[0] for name in HEALTHY} <= series | {"up"}
