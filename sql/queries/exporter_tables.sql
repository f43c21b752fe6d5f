-- How large is each table, without and with its indexes? Partitions count as the table that they are of.
-- TOAST, free space map and visibility map count as the table's, too.
SELECT r.relname::text, sum(pg_table_size(c.oid))::bigint, sum(pg_indexes_size(c.oid))::bigint
FROM pg_class AS c
INNER JOIN pg_class AS r ON r.oid = coalesce(pg_partition_root(c.oid), c.oid)
WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'
GROUP BY r.relname
ORDER BY r.relname
