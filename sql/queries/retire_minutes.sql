-- Take a partition's readings off the minutes in which they were stored, as the summaries know them. How many readings were that?
WITH gone AS (
    SELECT minute, sum(rows)::bigint AS rows
    FROM (
        SELECT minute, rows FROM partition_minutes WHERE partition = %(partition)s
        UNION ALL
        SELECT l.minute, l.rows
        FROM late_changes AS l
        CROSS JOIN summary_state AS s
        WHERE l.partition = %(partition)s AND pg_visible_in_snapshot(l.changed_by, s.snapshot)
    ) AS known
    GROUP BY minute
    HAVING sum(rows) <> 0
),
merged AS (
    MERGE INTO ingestion_minutes AS m
    USING gone AS d ON m.minute = d.minute
    WHEN MATCHED AND m.rows = d.rows THEN DELETE
    WHEN MATCHED THEN UPDATE SET rows = m.rows - d.rows
    RETURNING d.rows
)
SELECT coalesce(sum(rows), 0)::bigint FROM merged
