-- How many readings are there? What the summaries have counted and the logs add; null when they must count again.
WITH pending AS MATERIALIZED (
    SELECT DISTINCT xmin AS version, created_at FROM summary_inserts
),
changes AS MATERIALIZED (
    SELECT *, xmin AS version FROM summary_changes
),
inserted AS (
    SELECT count(*) AS rows
    FROM metrics AS m
    INNER JOIN pending AS p ON m.xmin = p.version AND m.created_at = p.created_at
    WHERE m.created_at BETWEEN (SELECT min(created_at) FROM pending) AND (SELECT max(created_at) FROM pending)
),
changed AS (
    SELECT count(*) AS rows
    FROM (SELECT DISTINCT device_id, published_at, metric_name FROM changes) AS k
    CROSS JOIN LATERAL (
        SELECT m.xmin AS version, m.created_at
        FROM metrics AS m
        WHERE m.device_id = k.device_id AND m.published_at = k.published_at AND m.metric_name = k.metric_name
        -- Keeps this a lookup by key.
        OFFSET 0
    ) AS m
    WHERE NOT EXISTS (SELECT FROM pending AS p WHERE p.version = m.version AND p.created_at = m.created_at)
),
removed AS (
    SELECT count(*) AS rows
    FROM (
        -- An update that moves a reading into another partition says so twice.
        SELECT DISTINCT device_id, published_at, metric_name, old_created_at, old_xmin FROM changes
    ) AS c
    WHERE
        c.old_xmin IS NOT NULL
        AND NOT EXISTS (SELECT FROM pending AS p WHERE p.version = c.old_xmin AND p.created_at = c.old_created_at)
        AND NOT EXISTS (
            SELECT FROM changes AS o
            WHERE
                o.version = c.old_xmin
                AND o.device_id = c.device_id AND o.published_at = c.published_at AND o.metric_name = c.metric_name
        )
)
SELECT
    CASE
        WHEN source = metrics_source()
            THEN rows + (SELECT rows FROM inserted) + (SELECT rows FROM changed) - (SELECT rows FROM removed)
    END
FROM summary_state
