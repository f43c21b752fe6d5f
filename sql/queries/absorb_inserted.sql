-- Readings of one span of created_at that logged statements inserted, as far as they are what was inserted.
INSERT INTO summary_delta
WITH pending AS MATERIALIZED (
    SELECT DISTINCT xmin AS version, created_at
    FROM summary_inserts
    WHERE created_at BETWEEN %(low)s AND %(high)s
)
SELECT
    m.device_id,
    m.metric_name,
    date_bin('10 minutes', m.published_at, '2000-01-01 00:00:00+00') AS slot,
    date_bin('1 minute', m.created_at, '2000-01-01 00:00:00+00') AS minute,
    false,
    count(*),
    sum(m.value::text::numeric),
    min(m.value),
    max(m.value),
    min(m.published_at),
    max(m.published_at)
FROM metrics AS m
INNER JOIN pending AS p ON m.xmin = p.version AND m.created_at = p.created_at
WHERE m.created_at BETWEEN %(low)s AND %(high)s
GROUP BY m.device_id, m.metric_name, slot, minute
