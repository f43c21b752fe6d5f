-- Readings of one span of created_at that logged statements inserted, as far as they are what was inserted.
-- They go into the minutes, and are put by for the devices, many entries a row; how many are that?
WITH pending AS MATERIALIZED (
    SELECT DISTINCT
        xmin AS version,
        created_at,
        date_bin('1 minute', created_at, '2000-01-01 00:00:00+00') AS minute
    FROM summary_inserts
    WHERE created_at BETWEEN %(low)s AND %(high)s
),
figures AS (
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
packs AS MATERIALIZED (
    SELECT
        minute,
        sum(rows) AS rows,
        array_agg(
            (
                device_id, metric_name, slot, rows, ten_thousandths, others, min, max, first_seen, last_seen
            )::device_entry
        ) AS entries
    FROM figures
    GROUP BY minute, uuid_hash(device_id) & %(mask)s
),
minutes AS (
    INSERT INTO summary_minutes (minute, rows)
    SELECT minute, sum(rows) FROM packs GROUP BY minute
),
packed AS (
    INSERT INTO device_deltas (entries)
    SELECT entries FROM packs
)
SELECT coalesce(sum(cardinality(entries)), 0)::bigint FROM packs
