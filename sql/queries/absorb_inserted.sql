-- Readings of one span of created_at that logged statements inserted, as far as they are what was inserted.
-- They go into the minutes, and are put by for the devices, side by side in arrays; how many entries are that?
WITH pending AS MATERIALIZED (
    SELECT DISTINCT
        xmin AS version,
        created_at,
        date_bin('1 minute', created_at, '2000-01-01 00:00:00+00') AS minute
    FROM summary_inserts
    WHERE created_at BETWEEN %(low)s AND %(high)s
),
figures AS MATERIALIZED (
    SELECT
        m.device_id,
        m.metric_name,
        date_bin('1 hour', m.published_at, '2000-01-01 00:00:00+00') AS slot,
        p.minute,
        count(*) AS rows,
        -- Up to four decimals in whole numbers: a sum of numerics keeps 150 bytes a group, and costs more than all the rest.
        -- Such a decimal has at most ten digits, so the double that is nearest to it is written as this very decimal.
        sum(
            CASE
                WHEN abs(m.value) < 200000 AND round(m.value * 10000) / 10000 = m.value THEN (m.value * 10000)::integer
            END
        ) AS ten_thousandths,
        sum(m.value::text::numeric) FILTER (
            WHERE NOT (abs(m.value) < 200000 AND round(m.value * 10000) / 10000 = m.value)
        ) AS others,
        min(m.value) AS min,
        max(m.value) AS max,
        min(m.published_at) AS first_seen,
        max(m.published_at) AS last_seen
    FROM metrics AS m
    INNER JOIN pending AS p ON m.xmin = p.version AND m.created_at = p.created_at
    WHERE m.created_at BETWEEN %(low)s AND %(high)s
    GROUP BY m.device_id, m.metric_name, slot, p.minute
),
minutes AS (
    INSERT INTO summary_minutes (minute, rows)
    SELECT minute, sum(rows) FROM figures GROUP BY minute
),
packed AS (
    INSERT INTO device_deltas (device_ids, metric_names, slots, rows, totals, mins, maxs, first_seen, last_seen)
    SELECT
        array_agg(device_id),
        array_agg(metric_name),
        array_agg(slot),
        array_agg(rows),
        array_agg(
            CASE
                WHEN others IS NULL THEN ten_thousandths * 0.0001
                ELSE coalesce(ten_thousandths * 0.0001, 0) + others
            END
        ),
        array_agg(min),
        array_agg(max),
        array_agg(first_seen),
        array_agg(last_seen)
    FROM figures
    GROUP BY uuid_hash(device_id) & %(mask)s
    RETURNING cardinality(device_ids) AS entries
)
SELECT coalesce(sum(entries), 0)::bigint FROM packed
