-- Store a staged batch over whatever is there: in key order, so that no two writers wait for each other in a circle.
-- The comparison by image keeps the sign of -0.0 and leaves rows alone that would not change. Without the casts PostgreSQL looks for
-- the operator field by field.
INSERT INTO metrics AS m (device_id, published_at, metric_name, value, tags)
SELECT i.device_id, i.published_at, i.metric_name, i.value, i.tags
FROM incoming_metrics AS i
ORDER BY i.device_id, i.published_at, i.metric_name
ON CONFLICT (device_id, published_at, metric_name) DO UPDATE
SET value = excluded.value, tags = excluded.tags
WHERE ROW(m.value, m.tags)::record *<> ROW(excluded.value, excluded.tags)::record
