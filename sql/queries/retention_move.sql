-- Store readings of a partition that goes once more, as they were, by their keys.
INSERT INTO metrics (device_id, published_at, metric_name, value, tags, created_at)
SELECT k.device_id, k.published_at, k.metric_name, m.value, m.tags, m.created_at
FROM unnest(%s::uuid [], %s::timestamptz [], %s::smallint []) AS k (device_id, published_at, metric_name)
CROSS JOIN LATERAL (
    SELECT m.value, m.tags, m.created_at
    FROM {table} AS m
    WHERE m.device_id = k.device_id AND m.published_at = k.published_at AND m.metric_name = k.metric_name
    -- Keeps this a lookup by key.
    OFFSET 0
) AS m
