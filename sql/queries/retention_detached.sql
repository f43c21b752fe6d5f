-- The partitions that are detached and not dropped yet, each with whether a table of that name is the one that was detached.
SELECT
    d.number,
    d.partition,
    d.detached_at,
    c.oid IS NOT NULL AS there,
    c.relkind = 'r' AND NOT c.relispartition AND pg_get_userbyid(c.relowner) = 'metrics_owner'
    AND obj_description(c.oid, 'pg_class') = %(mark)s || d.number AS ours
FROM detached_partitions AS d
LEFT JOIN pg_class AS c ON c.oid = to_regclass('metrics_detached_' || d.number)
WHERE d.dropped_at IS NULL
ORDER BY d.number
