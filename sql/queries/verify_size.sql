-- About how many rows has metrics (from its size, exact counting would read it all), and from when on has nothing been dropped (us since 2000)?
SELECT
    coalesce(sum(
        pg_relation_size(c.oid) / CASE WHEN c.reltuples > 0 AND c.relpages > 0 THEN 8192::bigint * c.relpages / c.reltuples ELSE 100 END
    ), 0)::bigint,
    (SELECT (extract(EPOCH FROM retained_from - '2000-01-01 00:00:00+00') * 1000000)::bigint FROM retention_state)
FROM pg_partition_tree('metrics') AS t
INNER JOIN pg_class AS c ON c.oid = t.relid
WHERE t.isleaf
