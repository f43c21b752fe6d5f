-- The partitions of metrics in order of time, with the bound that each ends at (null: none), its bytes, and about how many rows it has.
SELECT
    c.relname,
    substring(b.bound FROM 'FROM \(''([^'']+)''')::timestamptz AS low,
    substring(b.bound FROM 'TO \(''([^'']+)''')::timestamptz AS high,
    pg_total_relation_size(c.oid)::bigint AS bytes,
    -- As the planner estimates it; a page holds about 60 readings.
    (
        CASE WHEN c.relpages > 0 AND c.reltuples >= 0 THEN c.reltuples / c.relpages ELSE 60 END
        * (pg_relation_size(c.oid) / current_setting('block_size')::integer)
    )::bigint AS rows
FROM pg_inherits AS i
INNER JOIN pg_class AS c ON c.oid = i.inhrelid
CROSS JOIN LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid) AS bound) AS b
WHERE i.inhparent = 'metrics'::regclass
ORDER BY low NULLS FIRST
