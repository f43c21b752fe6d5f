-- Look for the extremes that are in doubt among the readings of their slots; one that is still there ends the search early.
WITH doubted AS (
    DELETE FROM summary_stale RETURNING *
),
found AS (
    SELECT
        d.device_id,
        d.metric_name,
        d.slot,
        CASE
            WHEN d.min AND NOT EXISTS (
                SELECT FROM metrics AS m
                WHERE
                    m.device_id = d.device_id AND m.metric_name = d.metric_name AND m.value = s.min
                    AND m.published_at >= d.slot AND m.published_at < d.slot + interval '1 hour'
            )
                THEN (
                    SELECT min(m.value) FROM metrics AS m
                    WHERE
                        m.device_id = d.device_id AND m.metric_name = d.metric_name
                        AND m.published_at >= d.slot AND m.published_at < d.slot + interval '1 hour'
                )
            ELSE s.min
        END AS min,
        CASE
            WHEN d.max AND NOT EXISTS (
                SELECT FROM metrics AS m
                WHERE
                    m.device_id = d.device_id AND m.metric_name = d.metric_name AND m.value = s.max
                    AND m.published_at >= d.slot AND m.published_at < d.slot + interval '1 hour'
            )
                THEN (
                    SELECT max(m.value) FROM metrics AS m
                    WHERE
                        m.device_id = d.device_id AND m.metric_name = d.metric_name
                        AND m.published_at >= d.slot AND m.published_at < d.slot + interval '1 hour'
                )
            ELSE s.max
        END AS max,
        CASE
            WHEN d.first_seen
                THEN (
                    SELECT m.published_at FROM metrics AS m
                    WHERE
                        m.device_id = d.device_id AND m.metric_name = d.metric_name
                        AND m.published_at >= d.slot AND m.published_at < d.slot + interval '1 hour'
                    ORDER BY m.published_at LIMIT 1
                )
            ELSE s.first_seen
        END AS first_seen,
        CASE
            WHEN d.last_seen
                THEN (
                    SELECT m.published_at FROM metrics AS m
                    WHERE
                        m.device_id = d.device_id AND m.metric_name = d.metric_name
                        AND m.published_at >= d.slot AND m.published_at < d.slot + interval '1 hour'
                    ORDER BY m.published_at DESC LIMIT 1
                )
            ELSE s.last_seen
        END AS last_seen
    FROM doubted AS d
    INNER JOIN device_slots AS s USING (device_id, metric_name, slot)
)
UPDATE device_slots AS s
SET min = f.min, max = f.max, first_seen = f.first_seen, last_seen = f.last_seen
FROM found AS f
WHERE s.device_id = f.device_id AND s.metric_name = f.metric_name AND s.slot = f.slot
