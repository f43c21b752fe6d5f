-- Which table a partition is: cluster, database, table and file, about how many rows it has, and which transactions have changed it.
SELECT
    concat_ws('/', (SELECT system_identifier FROM pg_control_system()), d.oid, c.oid) AS source,
    c.oid::bigint AS relation,
    pg_relation_filenode(c.oid)::bigint AS filenode,
    greatest(c.reltuples, 0)::bigint AS rows,
    (SELECT coalesce(array_agg(x.version::text), '{}') FROM archive_changes AS x WHERE x.relation = c.oid) AS changes
FROM pg_class AS c
CROSS JOIN pg_database AS d
WHERE c.oid = to_regclass(%(partition)s) AND d.datname = current_database()
