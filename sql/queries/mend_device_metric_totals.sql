-- Look for the extremes that are in doubt among the slots, which are right at this point.
WITH doubted AS (
    DELETE FROM summary_stale RETURNING *
)
UPDATE device_metric_totals AS s
SET
    min = CASE
        WHEN d.min
            THEN (
                SELECT min(o.min) FROM device_slots AS o
                WHERE
                    o.device_id = s.device_id AND o.metric_name = s.metric_name
                    AND o.slot < (SELECT settled_before FROM summary_state)
            )
        ELSE s.min
    END,
    max = CASE
        WHEN d.max
            THEN (
                SELECT max(o.max) FROM device_slots AS o
                WHERE
                    o.device_id = s.device_id AND o.metric_name = s.metric_name
                    AND o.slot < (SELECT settled_before FROM summary_state)
            )
        ELSE s.max
    END,
    -- Slots are in order of time: one look-up each.
    first_seen = CASE
        WHEN d.first_seen
            THEN (
                SELECT o.first_seen FROM device_slots AS o
                WHERE o.device_id = s.device_id AND o.metric_name = s.metric_name
                ORDER BY o.slot LIMIT 1
            )
        ELSE s.first_seen
    END,
    last_seen = CASE
        WHEN d.last_seen
            THEN (
                SELECT o.last_seen FROM device_slots AS o
                WHERE
                    o.device_id = s.device_id AND o.metric_name = s.metric_name
                    AND o.slot < (SELECT settled_before FROM summary_state)
                ORDER BY o.slot DESC LIMIT 1
            )
        ELSE s.last_seen
    END
FROM doubted AS d
WHERE s.device_id = d.device_id AND s.metric_name = d.metric_name
