-- The devices with the most readings, a row for each of their metrics.
SELECT
    d.device_id,
    d.rows,
    d.first_seen,
    d.last_seen,
    n.name,
    m.rows,
    m.min,
    m.mean,
    m.max
FROM (SELECT * FROM device_summary ORDER BY rows DESC, device_id LIMIT %(limit)s) AS d
INNER JOIN device_metric_summary AS m USING (device_id)
INNER JOIN metric_names AS n ON n.code = m.metric_name
ORDER BY d.rows DESC, d.device_id, m.metric_name
