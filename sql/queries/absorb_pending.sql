-- What was put by, once for all that it is folded into: an entry for each device, metric and slot.
INSERT INTO summary_pending (device_id, metric_name, slot, rows, total, min, max, first_seen, last_seen)
SELECT
    device_id,
    metric_name,
    slot,
    sum(rows),
    CASE
        WHEN count(others) = 0 THEN sum(ten_thousandths) * 0.0001
        ELSE coalesce(sum(ten_thousandths) * 0.0001, 0) + sum(others)
    END,
    min(min),
    max(max),
    min(first_seen),
    max(last_seen)
FROM device_deltas AS d
CROSS JOIN LATERAL unnest(d.entries)
GROUP BY device_id, metric_name, slot
