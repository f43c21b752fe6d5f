-- Look for the extremes that are in doubt among the slots, which are right at this point.
WITH doubted AS (
    DELETE FROM summary_stale RETURNING *
)
UPDATE device_metric_totals AS s
SET (min, max, first_seen, last_seen) = (
    SELECT min(o.min), max(o.max), min(o.first_seen), max(o.last_seen)
    FROM device_slots AS o
    WHERE
        o.device_id = s.device_id AND o.metric_name = s.metric_name
        AND o.slot < (SELECT settled_before FROM summary_state)
)
FROM doubted AS d
WHERE s.device_id = d.device_id AND s.metric_name = d.metric_name
