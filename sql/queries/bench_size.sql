-- Bytes of the table metrics with all its partitions: rows, and their indexes.
SELECT sum(pg_table_size(relid))::bigint, sum(pg_indexes_size(relid))::bigint
FROM pg_partition_tree('metrics')
WHERE isleaf
