-- About how many rows metrics has, from its size on disk: exact counting would read it all.
SELECT (pg_relation_size(oid) / CASE WHEN reltuples > 0 AND relpages > 0 THEN 8192::bigint * relpages / reltuples ELSE 100 END)::bigint
FROM pg_class
WHERE oid = 'metrics'::regclass
