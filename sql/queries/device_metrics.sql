-- How many devices are there, and which have the most readings? A row for each metric of those.
WITH figures AS MATERIALIZED (
    SELECT * FROM device_metric_summary
),
busiest AS (
    SELECT
        device_id,
        sum(rows)::bigint AS rows,
        min(first_seen) AS first_seen,
        max(last_seen) AS last_seen,
        count(*) OVER () AS devices
    FROM figures
    GROUP BY device_id
    ORDER BY rows DESC, device_id
    LIMIT %(limit)s
)
SELECT
    d.devices,
    d.device_id,
    d.rows,
    d.first_seen,
    d.last_seen,
    n.name,
    m.rows,
    m.min,
    m.mean,
    m.max
FROM busiest AS d
INNER JOIN figures AS m USING (device_id)
INNER JOIN metric_names AS n ON n.code = m.metric_name
ORDER BY d.rows DESC, d.device_id, m.metric_name
