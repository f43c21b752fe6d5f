-- Keys of a partition that is being split which the summaries have to look at again: what came since the last tick, and what was changed.
INSERT INTO split_changes (device_id, published_at, metric_name)
WITH pending AS MATERIALIZED (
    SELECT DISTINCT xmin AS version, created_at FROM summary_inserts
)
SELECT m.device_id, m.published_at, m.metric_name
FROM {table} AS m
INNER JOIN pending AS p ON m.xmin = p.version AND m.created_at = p.created_at
WHERE m.created_at BETWEEN (SELECT min(created_at) FROM pending) AND (SELECT max(created_at) FROM pending)
UNION ALL
SELECT device_id, published_at, metric_name
FROM summary_changes
WHERE published_at >= %(low)s AND published_at < coalesce(%(high)s::timestamptz, 'infinity')
