-- Inserts per minute over the last ten minutes, the current one included, as they are in the summaries now.
WITH stale AS (
    DELETE FROM ingestion_rate
    WHERE minute <= date_bin('1 minute', statement_timestamp(), '2000-01-01 00:00:00+00') - interval '10 minutes'
    OR minute > statement_timestamp()
)
INSERT INTO ingestion_rate AS r (minute, rows)
SELECT minute, coalesce(m.rows, 0)
FROM generate_series(
    date_bin('1 minute', statement_timestamp(), '2000-01-01 00:00:00+00') - interval '9 minutes',
    statement_timestamp(),
    interval '1 minute'
) AS minute
LEFT JOIN ingestion_minutes AS m USING (minute)
ON CONFLICT (minute) DO UPDATE SET rows = excluded.rows WHERE r.rows <> excluded.rows
