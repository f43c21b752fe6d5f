-- What PostgreSQL counted since its statistics were last reset, and how many sessions there are: one row.
SELECT
    d.xact_commit,
    d.tup_inserted,
    d.tup_updated,
    d.deadlocks,
    w.wal_bytes::float8,
    c.num_timed,
    c.num_requested,
    (SELECT sum(numbackends) FROM pg_stat_database)::float8
FROM pg_stat_database AS d
CROSS JOIN pg_stat_wal AS w
CROSS JOIN pg_stat_checkpointer AS c
WHERE d.datname = current_database()
