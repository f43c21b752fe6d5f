"""The tables of the summaries, each beside the same figures counted over all readings."""

from __future__ import annotations

from typing import Final

from metrics_pipeline import postgres

PAIRS: Final = {
    "device_metric_summary": (
        "SELECT device_id, metric_name, rows, min, mean, max, first_seen, last_seen FROM device_metric_summary ORDER BY 1, 2",
        postgres.query("device_metric_summary_plain"),
    ),
    "device_summary": (
        "SELECT device_id, rows, first_seen, last_seen FROM device_summary ORDER BY 1",
        postgres.query("device_summary_plain"),
    ),
    "ingestion_minutes": (
        "SELECT minute, rows FROM ingestion_minutes ORDER BY 1",
        "SELECT date_trunc('minute', created_at), count(*) FROM metrics GROUP BY 1 ORDER BY 1",
    ),
    "device_slots": (
        (
            "SELECT device_id, metric_name, slot, sum(rows), sum(total), min(min), max(max), min(first_seen), max(last_seen) "
            "FROM (TABLE device_slots UNION ALL TABLE device_pending) GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        ),
        (
            "SELECT device_id, metric_name, date_bin('1 hour', published_at, '2000-01-01 00:00:00+00'), count(*), "
            "sum(value::text::numeric), min(value), max(value), min(published_at), max(published_at) "
            "FROM metrics GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        ),
    ),
    "device_metric_totals": (
        "SELECT * FROM device_metric_totals ORDER BY 1, 2",
        (
            "SELECT device_id, metric_name, sum(rows), sum(total), min(min), max(max), min(first_seen), max(last_seen) "
            "FROM device_slots WHERE slot < (SELECT settled_before FROM summary_state) GROUP BY 1, 2 ORDER BY 1, 2"
        ),
    ),
    "device_deltas": ("SELECT count(*) FROM device_pending", "SELECT pending FROM summary_state"),
    "summary_state": ("SELECT rows FROM summary_state", "SELECT count(*) FROM metrics"),
}
"""By table: how it is read, and the count that it has to equal in one snapshot."""
