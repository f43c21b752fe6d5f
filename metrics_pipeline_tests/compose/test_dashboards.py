"""Dashboard and alerts: made from code, PromQL that parses, complete, and every alert tested."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml

from metrics_pipeline.compose.dashboards import FILE, ROWS, SOURCE, dashboard, text
from metrics_pipeline.settings import ROOT, Settings

PROMETHEUS = ROOT / "compose" / "prometheus"
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text("utf-8"))
TESTS = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text("utf-8"))
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [query for _, row in ROWS for panel in row for _, query in panel.queries]

RULES_SCHEMA = {
    # https://prometheus.io/docs/prometheus/3.5/configuration/recording_rules/#rule
    "type": "object",
    "required": ["groups"],
    "additionalProperties": False,
    "properties": {
        "groups": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "rules"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "interval": {"type": "string"},
                    "rules": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["alert", "expr", "labels", "annotations"],
                            "additionalProperties": False,
                            "properties": {
                                "alert": {"type": "string"},
                                "expr": {"type": "string"},
                                "for": {"type": "string", "pattern": r"^\d+[smh]$"},
                                "labels": {"type": "object"},
                                "annotations": {"type": "object", "required": ["summary", "description"]},
                            },
                        },
                    },
                },
            },
        }
    },
}
PANEL_SCHEMA = {
    # https://grafana.com/docs/grafana/v12.2/dashboards/build-dashboards/view-dashboard-json-model/
    "type": "object",
    "required": ["id", "type", "title", "gridPos"],
    "additionalProperties": False,
    "properties": {
        "id": {"type": "integer"},
        "type": {"enum": ["row", "timeseries"]},
        "title": {"type": "string"},
        "description": {"type": "string"},
        "datasource": {"const": SOURCE},
        "collapsed": {"type": "boolean"},
        "panels": {"type": "array"},
        "gridPos": {
            "type": "object",
            "required": ["h", "w", "x", "y"],
            "additionalProperties": False,
            "properties": {name: {"type": "integer", "minimum": 0, "maximum": 200} for name in "hwxy"},
        },
        "fieldConfig": {"type": "object", "required": ["defaults", "overrides"]},
        "options": {"type": "object"},
        "targets": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["refId", "expr", "datasource"],
                "additionalProperties": False,
                "properties": {name: {} for name in ("refId", "datasource", "expr", "legendFormat", "range")},
            },
        },
    },
}


def names_in(expression: Any) -> set[str]:
    """Names of the metrics in a parsed query."""
    if isinstance(expression, promql_parser.VectorSelector):
        return {expression.name} if expression.name else set()
    found: set[str] = set()
    for attribute in ("expr", "lhs", "rhs", "vector_selector", "param"):
        inner = getattr(expression, attribute, None)
        if inner is not None and not isinstance(inner, (str, int, float)):
            found |= names_in(inner)
    args = getattr(expression, "args", None)
    for inner in args if isinstance(args, list) else ():
        found |= names_in(inner)
    return found


def test_dashboard_is_the_one_of_the_code() -> None:
    assert FILE.read_text("utf-8") == text(), "run `python -m metrics_pipeline.compose.dashboards`"


def test_dashboard_has_the_shape_that_grafana_reads() -> None:
    model = json.loads(FILE.read_text("utf-8"))
    panels = model["panels"]
    for panel in panels:
        jsonschema.validate(panel, PANEL_SCHEMA)
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24


def test_dashboard_shows_what_was_asked_for() -> None:
    named = {name for query in QUERIES for name in names_in(promql_parser.parse(query))}
    for name in (
        "metrics_pipeline_rows",
        "metrics_producer_messages_total",
        "metrics_pipeline_lag",
        "metrics_producer_latency_seconds_bucket",
        "metrics_pipeline_rejected_rows",
        "metrics_pipeline_sink_task",
        "metrics_pipeline_postgres_wal_bytes_total",
        "metrics_pipeline_postgres_checkpoints_total",
        "metrics_pipeline_table_bytes",
        "metrics_pipeline_dagster_runs",
    ):
        assert name in named
    assert len(dashboard()["panels"]) == len(ROWS) + sum(len(row) for _, row in ROWS)


@pytest.mark.parametrize("query", [*QUERIES, *(rule["expr"] for rule in RULES)])
def test_query_parses_and_names_metrics(query: str) -> None:
    assert names_in(promql_parser.parse(query))


def test_a_query_that_is_wrong_would_be_seen() -> None:
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse("sum(rate(metrics_pipeline_rows[1m])")


@pytest.mark.parametrize(("legend", "query"), [line for _, row in ROWS for panel in row for line in panel.queries])
def test_labels_of_a_legend_survive_its_query(legend: str, query: str) -> None:
    kept = re.search(r"\bby \(([^)]*)\)", query)
    for label in re.findall(r"\{\{(\w+)\}\}", legend):
        assert kept is None or label in kept[1].split(", "), f"{legend}: {query}"


def test_alerts_have_the_shape_that_prometheus_reads() -> None:
    jsonschema.validate(ALERTS, RULES_SCHEMA)
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_every_alert_is_tested_firing_and_silent() -> None:
    cases = [case for test in TESTS["tests"] for case in test["alert_rule_test"]]
    for rule in RULES:
        of_this = [case for case in cases if case["alertname"] == rule["alert"]]
        assert any(case.get("exp_alerts") for case in of_this), f"{rule['alert']} never fires in a test"
        assert any(not case.get("exp_alerts") for case in of_this), f"{rule['alert']} is never silent in a test"


def test_what_the_tests_expect_is_what_the_alerts_say() -> None:
    by_name = {rule["alert"]: rule for rule in RULES}
    for test in TESTS["tests"]:
        for case in test["alert_rule_test"]:
            for expected in case.get("exp_alerts", ()):
                rule = by_name[case["alertname"]]
                assert expected["exp_labels"].items() >= rule["labels"].items()
                said = rule["annotations"]["description"]
                assert "{{" in said or expected["exp_annotations"]["description"] == said


def test_the_limit_of_the_lag_is_the_setting_s_default() -> None:
    (rule,) = (rule for rule in RULES if rule["alert"] == "LagGrowing")
    assert f"> {Settings.load().lag_limit} and" in rule["expr"]


def test_promtool_is_content() -> None:
    """As the workflow runs it in Prometheus' own image."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on the PATH")
    for command in (["check", "config", "prometheus.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run([promtool, *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
