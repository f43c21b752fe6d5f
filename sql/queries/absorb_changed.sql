-- Readings that stand now under the keys that were changed.
INSERT INTO summary_delta
WITH keys AS (
    SELECT DISTINCT device_id, published_at, metric_name FROM summary_changes
)
SELECT
    device_id,
    metric_name,
    date_bin('10 minutes', published_at, '2000-01-01 00:00:00+00') AS slot,
    date_bin('1 minute', created_at, '2000-01-01 00:00:00+00') AS minute,
    false,
    count(*),
    sum(value::text::numeric),
    min(value),
    max(value),
    min(published_at),
    max(published_at)
FROM keys
INNER JOIN metrics USING (device_id, published_at, metric_name)
GROUP BY device_id, metric_name, slot, minute
