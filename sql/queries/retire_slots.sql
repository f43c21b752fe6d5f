-- Take the slots of a stretch away, and off the totals; note whose extremes are in doubt. How many readings were that?
WITH gone AS (
    DELETE FROM device_slots
    WHERE slot >= coalesce(%(low)s::timestamptz, '-infinity') AND slot < %(high)s
    RETURNING device_id, metric_name, slot, rows, total, min, max, first_seen, last_seen
),
settled AS (
    SELECT
        device_id, metric_name,
        sum(rows)::bigint AS rows,
        sum(total) AS total,
        min(min) AS min,
        max(max) AS max,
        min(first_seen) AS first_seen,
        max(last_seen) AS last_seen
    FROM gone
    WHERE slot < (SELECT settled_before FROM summary_state)
    GROUP BY device_id, metric_name
),
merged AS (
    MERGE INTO device_metric_totals AS s
    USING settled AS d ON s.device_id = d.device_id AND s.metric_name = d.metric_name
    WHEN MATCHED AND s.rows = d.rows THEN DELETE
    WHEN MATCHED THEN UPDATE SET rows = s.rows - d.rows, total = s.total - d.total
    RETURNING
        merge_action() AS action,
        d.device_id, d.metric_name,
        d.min = s.min AS min,
        d.max = s.max AS max,
        d.first_seen = s.first_seen AS first_seen,
        d.last_seen = s.last_seen AS last_seen
),
doubted AS (
    INSERT INTO summary_stale (device_id, metric_name, min, max, first_seen, last_seen)
    SELECT device_id, metric_name, min, max, first_seen, last_seen
    FROM merged
    WHERE action = 'UPDATE' AND (min OR max OR first_seen OR last_seen)
)
SELECT coalesce(sum(rows), 0)::bigint FROM gone
