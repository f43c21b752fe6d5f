-- About how many rows metrics has, from its size on disk: exact counting would read it all.
SELECT
    coalesce(sum(
        pg_relation_size(c.oid) / CASE WHEN c.reltuples > 0 AND c.relpages > 0 THEN 8192::bigint * c.relpages / c.reltuples ELSE 100 END
    ), 0)::bigint
FROM pg_partition_tree('metrics') AS t
INNER JOIN pg_class AS c ON c.oid = t.relid
WHERE t.isleaf
