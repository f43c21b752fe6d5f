"""Grafana's dashboard as code: `python -m metrics_pipeline.compose.dashboards` writes compose/grafana/dashboards.

The JSON model: https://grafana.com/docs/grafana/v12.2/dashboards/build-dashboards/view-dashboard-json-model/
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from metrics_pipeline.settings import ROOT

FILE: Final = ROOT / "compose" / "grafana" / "dashboards" / "pipeline.json"
SOURCE: Final = {"type": "prometheus", "uid": "prometheus"}
COLUMNS: Final = 3
HEIGHT: Final = 8


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart over time.

    Attributes:
        title: what it shows.
        unit: Grafana's id of the unit: `short`, `s`, `ms`, `bytes`, `Bps`, `cps`, `percentunit`.
        queries: legend (with `{{label}}`) and PromQL of each line.
        description: shown at the title; empty for none.
        stack: lines on top of each other.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    description: str = ""
    stack: bool = False


ROWS: Final[tuple[tuple[str, tuple[Panel, ...]], ...]] = (
    (
        "Readings",
        (
            Panel(
                "Rows and messages a second",
                "cps",
                (
                    ("rows stored", "rate(metrics_pipeline_rows[1m])"),
                    ("messages acknowledged", 'sum(rate(metrics_producer_messages_total{outcome="acknowledged"}[1m]))'),
                    ("stored by the COPY sink", "sum(rate(metrics_sink_rows_total[1m]))"),
                ),
                "Rows come from the table's own count: what is stored twice counts once.",
            ),
            Panel(
                "Lag",
                "short",
                (("partition {{partition}}", "sum by (partition) (metrics_pipeline_lag)"),),
                "Records that the active sink has still to store.",
                stack=True,
            ),
            Panel(
                "Latency",
                "s",
                (
                    (
                        "p50 acknowledged → visible",
                        "histogram_quantile(0.5, sum by (le) (rate(metrics_producer_latency_seconds_bucket[1m])))",
                    ),
                    (
                        "p99 acknowledged → visible",
                        "histogram_quantile(0.99, sum by (le) (rate(metrics_producer_latency_seconds_bucket[1m])))",
                    ),
                    (
                        "p99 COPY sink, broker → COMMIT",
                        "histogram_quantile(0.99, sum by (le) (rate(metrics_sink_latency_seconds_bucket[1m])))",
                    ),
                ),
            ),
        ),
    ),
    (
        "Parts",
        (
            Panel("Parts that are well", "short", (("{{part}}", "metrics_pipeline_up"),)),
            Panel(
                "Tasks and workers by state",
                "short",
                (
                    ("tasks {{state}}", "sum by (state) (metrics_pipeline_sink_task)"),
                    ("COPY workers {{state}}", "sum by (state) (metrics_sink_workers)"),
                ),
            ),
            Panel(
                "Rejected",
                "short",
                (
                    ("records that wait", "metrics_pipeline_rejected_rows"),
                    ("COPY sink, {{reason}}", "sum by (reason) (increase(metrics_sink_rejected_total[5m]))"),
                    (
                        "dead letters",
                        "sum(increase(kafka_connect_task_error_deadletterqueue_produce_requests_total[5m]))",
                    ),
                ),
            ),
        ),
    ),
    (
        "Producer and sinks",
        (
            Panel(
                "Producer",
                "short",
                (
                    ("in flight", "sum(metrics_producer_in_flight)"),
                    ("failed", 'sum(metrics_producer_messages_total{outcome="failed"})'),
                    ("unknown", 'sum(metrics_producer_messages_total{outcome="unknown"})'),
                    ("seconds without an answer", "max(metrics_producer_stalled_seconds)"),
                ),
            ),
            Panel(
                "Connect: time of a batch",
                "ms",
                (
                    ("task {{task}} mean", "kafka_connect_sink_task_put_batch_avg_time_ms"),
                    ("task {{task}} longest", "kafka_connect_sink_task_put_batch_max_time_ms"),
                ),
            ),
            Panel(
                "COPY sink: transactions a second",
                "cps",
                (
                    ("{{path}}", "sum by (path) (rate(metrics_sink_batches_total[1m]))"),
                    ("retries {{reason}}", "sum by (reason) (rate(metrics_sink_retries_total[1m]))"),
                    ("stuck in {{step}}", "sum by (step) (rate(metrics_sink_stalls_total[1m])) > 0"),
                ),
            ),
        ),
    ),
    (
        "PostgreSQL",
        (
            Panel("WAL", "Bps", (("written", "rate(metrics_pipeline_postgres_wal_bytes_total[1m])"),)),
            Panel(
                "Checkpoints",
                "short",
                (("{{kind}}", "increase(metrics_pipeline_postgres_checkpoints_total[10m])"),),
                "In ten minutes. Many requested ones: max_wal_size is small for this load.",
            ),
            Panel(
                "Sizes",
                "bytes",
                (("{{table}} {{kind}}", "topk(8, metrics_pipeline_table_bytes)"),),
                "The largest tables, with their indexes.",
            ),
        ),
    ),
    (
        "PostgreSQL and Dagster",
        (
            Panel(
                "Transactions and rows a second",
                "cps",
                (
                    ("commits", "rate(metrics_pipeline_postgres_xact_commit_total[1m])"),
                    ("rows inserted", "rate(metrics_pipeline_postgres_tup_inserted_total[1m])"),
                    ("rows updated", "rate(metrics_pipeline_postgres_tup_updated_total[1m])"),
                ),
            ),
            Panel(
                "Sessions and deadlocks",
                "short",
                (
                    ("sessions", "metrics_pipeline_postgres_connections"),
                    ("deadlocks in ten minutes", "increase(metrics_pipeline_postgres_deadlocks_total[10m])"),
                ),
            ),
            Panel(
                "Dagster's runs",
                "short",
                (("{{job}} {{status}}", "sum by (job, status) (metrics_pipeline_dagster_runs)"),),
                "By how they ended, of those that Dagster keeps (RUN_RETENTION_HOURS).",
            ),
        ),
    ),
    (
        "Redpanda (docker compose only)",
        (
            Panel(
                "Brokers and replicas",
                "short",
                (
                    ("brokers", "max(redpanda_cluster_brokers)"),
                    ("partitions without a leader", "max(redpanda_cluster_unavailable_partitions)"),
                    ("replicas behind", "sum(redpanda_kafka_under_replicated_replicas)"),
                ),
                "https://docs.redpanda.com/streaming/26.1/reference/public-metrics-reference/",
            ),
            Panel(
                "Traffic",
                "Bps",
                (("{{redpanda_request}}", "sum by (redpanda_request) (rate(redpanda_kafka_request_bytes_total[1m]))"),),
            ),
            Panel("Free disk", "bytes", (("{{instance}}", "redpanda_storage_disk_free_bytes"),)),
        ),
    ),
)
"""The dashboard from top to bottom."""


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": top},
            }
        )
        width = 24 // COLUMNS
        for column, panel in enumerate(row):
            place = {"h": HEIGHT, "w": width, "x": column * width, "y": top + 1}
            panels.append(_timeseries(len(panels) + 1, panel, place))
        top += 1 + HEIGHT
    return {
        "uid": "metrics-pipeline",
        "title": "Metrics pipeline",
        "tags": ["metrics-pipeline"],
        "schemaVersion": 41,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "utc",
        "annotations": {"list": []},
        "templating": {"list": []},
        "links": [],
        "panels": panels,
    }


def _timeseries(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {
                    "drawStyle": "line",
                    "fillOpacity": 20 if panel.stack else 5,
                    "showPoints": "never",
                    "stacking": {"mode": "normal" if panel.stack else "none", "group": "A"},
                },
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "range": True,
            }
            for index, (legend, expression) in enumerate(panel.queries)
        ],
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
