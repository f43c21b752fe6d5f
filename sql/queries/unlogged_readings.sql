-- Readings of a table whose keys are not in the log: those that are, the next tick counts.
SELECT r.device_id, r.published_at, r.metric_name, r.value, r.created_at
FROM {table} AS r
WHERE NOT EXISTS (
    SELECT FROM summary_changes AS c
    WHERE c.device_id = r.device_id AND c.published_at = r.published_at AND c.metric_name = r.metric_name
)
