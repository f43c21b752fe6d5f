-- Bytes of the table metrics: rows, and its indexes.
SELECT pg_table_size('public.metrics'), pg_indexes_size('public.metrics')
