-- Readings that were counted before and are gone: the versions that changes replaced, unless they have never been counted.
INSERT INTO summary_delta
SELECT
    c.device_id,
    c.metric_name,
    date_bin('1 hour', c.published_at, '2000-01-01 00:00:00+00') AS slot,
    date_bin('1 minute', c.old_created_at, '2000-01-01 00:00:00+00') AS minute,
    true,
    count(*),
    sum(c.old_value::text::numeric),
    min(c.old_value),
    max(c.old_value),
    min(c.published_at),
    max(c.published_at)
FROM (
    -- An update that moves a reading into another partition is an update and a delete, and says so twice.
    SELECT DISTINCT device_id, published_at, metric_name, old_value, old_created_at, old_xmin FROM summary_changes
) AS c
WHERE
    c.old_xmin IS NOT NULL
    -- Whatever a transaction made whose log rows are still here is not counted yet.
    AND NOT EXISTS (
        SELECT FROM summary_inserts AS i WHERE i.xmin = c.old_xmin AND i.created_at = c.old_created_at
    )
    AND NOT EXISTS (
        SELECT FROM summary_changes AS o
        WHERE
            o.xmin = c.old_xmin
            AND o.device_id = c.device_id AND o.published_at = c.published_at AND o.metric_name = c.metric_name
    )
GROUP BY c.device_id, c.metric_name, slot, minute
