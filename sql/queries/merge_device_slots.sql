-- Add what came to the slots, take off what went, and note whose extremes are in doubt; how many slots changed?
WITH changes AS (
    SELECT device_id, metric_name, slot, removed, rows, total, min, max, first_seen, last_seen
    FROM summary_delta
    UNION ALL
    SELECT device_id, metric_name, slot, false AS removed, rows, total, min, max, first_seen, last_seen
    FROM summary_pending
),
delta AS (
    SELECT
        device_id, metric_name, slot,
        sum(CASE WHEN removed THEN -rows ELSE rows END)::bigint AS rows,
        sum(CASE WHEN removed THEN -total ELSE total END) AS total,
        min(min) FILTER (WHERE NOT removed) AS min,
        max(max) FILTER (WHERE NOT removed) AS max,
        min(first_seen) FILTER (WHERE NOT removed) AS first_seen,
        max(last_seen) FILTER (WHERE NOT removed) AS last_seen,
        min(min) FILTER (WHERE removed) AS gone_min,
        max(max) FILTER (WHERE removed) AS gone_max,
        min(first_seen) FILTER (WHERE removed) AS gone_first_seen,
        max(last_seen) FILTER (WHERE removed) AS gone_last_seen
    FROM changes
    GROUP BY device_id, metric_name, slot
),
merged AS (
    MERGE INTO device_slots AS s
    USING delta AS d
        ON
            s.device_id = d.device_id AND s.metric_name = d.metric_name AND s.slot = d.slot
            -- So that hours that nothing came to are not read, however many there are.
            AND s.slot BETWEEN %(low)s AND %(high)s
    WHEN MATCHED AND s.rows + d.rows = 0 THEN DELETE
    WHEN MATCHED THEN UPDATE SET
        rows = s.rows + d.rows,
        total = s.total + d.total,
        min = least(s.min, d.min),
        max = greatest(s.max, d.max),
        first_seen = least(s.first_seen, d.first_seen),
        last_seen = greatest(s.last_seen, d.last_seen)
    WHEN NOT MATCHED THEN
        INSERT (device_id, metric_name, slot, rows, total, min, max, first_seen, last_seen)
        VALUES (d.device_id, d.metric_name, d.slot, d.rows, d.total, d.min, d.max, d.first_seen, d.last_seen)
    -- An extreme is in doubt when a reading went that had it and none came that has it.
    RETURNING
        merge_action() AS action,
        d.device_id, d.metric_name, d.slot,
        coalesce(d.gone_min = s.min AND d.min IS DISTINCT FROM s.min, false) AS min,
        coalesce(d.gone_max = s.max AND d.max IS DISTINCT FROM s.max, false) AS max,
        coalesce(d.gone_first_seen = s.first_seen AND d.first_seen IS DISTINCT FROM s.first_seen, false) AS first_seen,
        coalesce(d.gone_last_seen = s.last_seen AND d.last_seen IS DISTINCT FROM s.last_seen, false) AS last_seen
),
doubted AS (
    INSERT INTO summary_stale (device_id, metric_name, slot, min, max, first_seen, last_seen)
    SELECT device_id, metric_name, slot, min, max, first_seen, last_seen
    FROM merged
    WHERE action = 'UPDATE' AND (min OR max OR first_seen OR last_seen)
)
SELECT count(*) FROM merged
