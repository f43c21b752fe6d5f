-- Count a partition by the minute in which its readings were stored, as this snapshot shows it.
INSERT INTO partition_minutes (partition, file, minute, rows)
SELECT {name}, pg_relation_filenode({name}), date_bin('1 minute', created_at, '2000-01-01 00:00:00+00') AS minute, count(*)
FROM {table}
GROUP BY minute
