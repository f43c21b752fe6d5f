-- How large is each table, without and with its indexes? TOAST, free space map and visibility map count as the table's.
SELECT relname::text, pg_table_size(oid), pg_indexes_size(oid)
FROM pg_class
WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'
ORDER BY relname
