-- How many readings are there? What the summaries have counted, and what is in the logs since; null when they must begin anew.
WITH pending AS MATERIALIZED (
    SELECT DISTINCT xmin AS version, created_at FROM summary_inserts
),
keys AS MATERIALIZED (
    SELECT DISTINCT device_id, published_at, metric_name FROM summary_changes
)
SELECT
    CASE
        WHEN s.source = metrics_source() THEN
            s.rows
            + (
                SELECT count(*)
                FROM metrics AS m
                INNER JOIN pending AS p ON m.xmin = p.version AND m.created_at = p.created_at
                WHERE
                    m.created_at BETWEEN (SELECT min(created_at) FROM pending) AND (SELECT max(created_at) FROM pending)
                    AND NOT EXISTS (
                        SELECT FROM keys AS k
                        WHERE k.device_id = m.device_id AND k.published_at = m.published_at AND k.metric_name = m.metric_name
                    )
            )
            + (
                -- A lookup by key, whatever the planner may think of loops.
                SELECT count(*)
                FROM keys AS k
                WHERE (
                    SELECT true FROM metrics AS m
                    WHERE m.device_id = k.device_id AND m.published_at = k.published_at AND m.metric_name = k.metric_name
                )
            )
            - (
                SELECT count(*)
                FROM summary_changes AS c
                WHERE
                    c.old_xmin IS NOT NULL
                    AND NOT EXISTS (
                        SELECT FROM pending AS p WHERE p.version = c.old_xmin AND p.created_at = c.old_created_at
                    )
                    AND NOT EXISTS (
                        SELECT FROM summary_changes AS o
                        WHERE
                            o.xmin = c.old_xmin
                            AND o.device_id = c.device_id AND o.published_at = c.published_at
                            AND o.metric_name = c.metric_name
                    )
            )
    END
FROM summary_state AS s
