-- What was put by goes back, in an entry for each device, metric and slot.
INSERT INTO device_deltas (entries)
SELECT
    array_agg(
        (
            p.device_id, p.metric_name, p.slot, p.rows, whole.ten_thousandths,
            CASE WHEN whole.ten_thousandths IS NULL THEN p.total END, p.min, p.max, p.first_seen, p.last_seen
        )::device_entry
    )
FROM summary_pending AS p
CROSS JOIN LATERAL (
    -- As long as it is one: it takes less room.
    SELECT
        CASE
            WHEN abs(p.total) < 900000000000000 AND trunc(p.total * 10000) = p.total * 10000
                THEN (p.total * 10000)::bigint
        END AS ten_thousandths
) AS whole
GROUP BY uuid_hash(p.device_id) & %(mask)s
