-- Bytes of the table metrics with all its partitions, if it has any: rows, and their indexes.
SELECT sum(pg_table_size(relid))::bigint, sum(pg_indexes_size(relid))::bigint
FROM (
    SELECT relid FROM pg_partition_tree('metrics') WHERE isleaf
    UNION
    SELECT oid FROM pg_class WHERE oid = 'metrics'::regclass AND relkind = 'r'
) AS leaves
