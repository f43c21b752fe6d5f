-- Bytes of the pages of metrics, all partitions together, if it has any: cheap enough to be asked many times a second.
SELECT sum(pg_relation_size(relid))::bigint
FROM (
    SELECT relid FROM pg_partition_tree('metrics') WHERE isleaf
    UNION
    SELECT oid FROM pg_class WHERE oid = 'metrics'::regclass AND relkind = 'r'
) AS leaves
