-- Move the staged rows in the order of their keys over whatever is there: of those with one key the last that arrived. As sink_upsert.sql.
INSERT INTO metrics AS m (device_id, published_at, metric_name, value, tags)
SELECT DISTINCT ON (device_id, published_at, metric_name)
    device_id,
    published_at,
    metric_name,
    value,
    tags
FROM moving_metrics
ORDER BY device_id, published_at, metric_name, arrival DESC
ON CONFLICT (device_id, published_at, metric_name) DO UPDATE
SET value = excluded.value, tags = excluded.tags
WHERE ROW(m.value, m.tags)::record *<> ROW(excluded.value, excluded.tags)::record
