-- Inserts per minute over the last ten minutes, the current one included, counted over all readings.
SELECT minute, count(m.created_at) AS rows
FROM generate_series(
    date_bin('1 minute', statement_timestamp(), '2000-01-01 00:00:00+00') - interval '9 minutes',
    statement_timestamp(),
    interval '1 minute'
) AS minute
LEFT JOIN metrics AS m ON date_bin('1 minute', m.created_at, '2000-01-01 00:00:00+00') = minute
GROUP BY minute
ORDER BY minute
