-- Readings that stand now under the keys that were changed, unless they are among those found as inserted.
INSERT INTO summary_delta
WITH keys AS (
    SELECT DISTINCT device_id, published_at, metric_name FROM summary_changes
)
SELECT
    k.device_id,
    k.metric_name,
    date_bin('1 hour', k.published_at, '2000-01-01 00:00:00+00') AS slot,
    date_bin('1 minute', m.created_at, '2000-01-01 00:00:00+00') AS minute,
    false,
    count(*),
    sum(m.value::text::numeric),
    min(m.value),
    max(m.value),
    min(k.published_at),
    max(k.published_at)
FROM keys AS k
CROSS JOIN LATERAL (
    SELECT m.xmin AS version, m.created_at, m.value
    FROM metrics AS m
    WHERE m.device_id = k.device_id AND m.published_at = k.published_at AND m.metric_name = k.metric_name
    -- Keeps this a lookup by key.
    OFFSET 0
) AS m
WHERE NOT EXISTS (SELECT FROM summary_inserts AS i WHERE i.xmin = m.version AND i.created_at = m.created_at)
GROUP BY k.device_id, k.metric_name, slot, minute
