-- Add the slots that are over by now to the totals: nothing has to be looked up again, since nothing goes.
MERGE INTO device_metric_totals AS s
USING (
    SELECT
        device_id, metric_name,
        sum(rows)::bigint AS rows,
        sum(total) AS total,
        min(min) AS min,
        max(max) AS max,
        min(first_seen) AS first_seen,
        max(last_seen) AS last_seen
    FROM device_slots
    WHERE slot >= (SELECT settled_before FROM summary_state) AND slot < %(before)s
    GROUP BY device_id, metric_name
) AS d
ON s.device_id = d.device_id AND s.metric_name = d.metric_name
WHEN MATCHED THEN UPDATE SET
    rows = s.rows + d.rows,
    total = s.total + d.total,
    min = least(s.min, d.min),
    max = greatest(s.max, d.max),
    first_seen = least(s.first_seen, d.first_seen),
    last_seen = greatest(s.last_seen, d.last_seen)
WHEN NOT MATCHED THEN
    INSERT (device_id, metric_name, rows, total, min, max, first_seen, last_seen)
    VALUES (d.device_id, d.metric_name, d.rows, d.total, d.min, d.max, d.first_seen, d.last_seen)
