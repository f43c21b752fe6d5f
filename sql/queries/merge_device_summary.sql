-- Put the devices that readings came to or went from together out of their metrics.
MERGE INTO device_summary AS s
USING (
    SELECT
        d.device_id,
        coalesce(sum(m.rows), 0)::bigint AS rows,
        min(m.first_seen) AS first_seen,
        max(m.last_seen) AS last_seen
    FROM (SELECT DISTINCT device_id FROM summary_delta) AS d
    LEFT JOIN device_metric_summary AS m USING (device_id)
    GROUP BY d.device_id
) AS d
ON s.device_id = d.device_id
WHEN MATCHED AND d.rows = 0 THEN DELETE
WHEN MATCHED THEN UPDATE SET rows = d.rows, first_seen = d.first_seen, last_seen = d.last_seen
WHEN NOT MATCHED AND d.rows > 0 THEN
    INSERT (device_id, rows, first_seen, last_seen) VALUES (d.device_id, d.rows, d.first_seen, d.last_seen)
