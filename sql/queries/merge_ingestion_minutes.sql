-- Add what came to the minutes in which it was stored, and take off what went.
MERGE INTO ingestion_minutes AS m
USING (
    SELECT minute, sum(rows)::bigint AS rows
    FROM summary_minutes
    GROUP BY minute
) AS d
ON m.minute = d.minute
WHEN MATCHED AND m.rows + d.rows = 0 THEN DELETE
WHEN MATCHED AND d.rows <> 0 THEN UPDATE SET rows = m.rows + d.rows
WHEN NOT MATCHED THEN INSERT (minute, rows) VALUES (d.minute, d.rows)
