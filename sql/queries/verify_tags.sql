-- The tags of one row, to show beside those of its record.
SELECT tags
FROM metrics
WHERE (device_id, published_at, metric_name) = (%s, %s, %s)
