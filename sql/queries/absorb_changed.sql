-- Readings that stand now under the keys that were changed, and those that were counted before and are gone.
INSERT INTO summary_delta
WITH counted AS (
    SELECT c.device_id, c.metric_name, c.published_at, c.old_created_at AS created_at, c.old_value AS value
    FROM summary_changes AS c
    WHERE
        c.old_xmin IS NOT NULL
        -- A version made by a transaction whose log rows are still here has never been counted.
        AND NOT EXISTS (
            SELECT FROM summary_inserts AS i WHERE i.xmin = c.old_xmin AND i.created_at = c.old_created_at
        )
        AND NOT EXISTS (
            SELECT FROM summary_changes AS o
            WHERE
                o.xmin = c.old_xmin
                AND o.device_id = c.device_id AND o.published_at = c.published_at AND o.metric_name = c.metric_name
        )
),
keys AS (
    SELECT DISTINCT device_id, published_at, metric_name FROM summary_changes
),
readings AS (
    SELECT false AS removed, device_id, metric_name, published_at, created_at, value
    FROM keys INNER JOIN metrics USING (device_id, published_at, metric_name)
    UNION ALL
    SELECT true, device_id, metric_name, published_at, created_at, value FROM counted
)
SELECT
    device_id,
    metric_name,
    date_bin('10 minutes', published_at, '2000-01-01 00:00:00+00') AS slot,
    date_bin('1 minute', created_at, '2000-01-01 00:00:00+00') AS minute,
    removed,
    count(*),
    sum(value::text::numeric),
    min(value),
    max(value),
    min(published_at),
    max(published_at)
FROM readings
GROUP BY device_id, metric_name, slot, minute, removed
