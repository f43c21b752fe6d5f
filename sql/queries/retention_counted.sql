-- A partition's count: of the file that it has now? contained in the summaries? and how many readings, with what came since?
SELECT
    coalesce(bool_and(m.file = pg_relation_filenode(%(partition)s::text::regclass)), true),
    coalesce(bool_and(pg_visible_in_snapshot(m.counted_by, s.snapshot)), true),
    (coalesce(sum(m.rows), 0) + (SELECT coalesce(sum(rows), 0) FROM late_changes WHERE partition = %(partition)s))::bigint
FROM partition_minutes AS m
CROSS JOIN summary_state AS s
WHERE m.partition = %(partition)s
