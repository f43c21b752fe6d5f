-- Bytes of the table metrics: rows, and its indexes.
SELECT pg_table_size('metrics'), pg_indexes_size('metrics')
