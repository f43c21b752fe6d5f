-- End sessions of other COPY sink workers that hold a transaction open and wait for their client.
-- Theirs is a worker that was stopped or cut off; it finds out when it comes back, and begins again at the database's offsets.
SELECT count(pg_terminate_backend(a.pid))
FROM pg_stat_activity AS a
WHERE
    a.usename = current_user
    AND a.pid <> pg_backend_pid()
    AND a.application_name LIKE 'metrics-pipeline sink%%'
    AND a.xact_start < clock_timestamp() - %(seconds)s * interval '1 second'
    AND (a.state LIKE 'idle in transaction%%' OR a.wait_event = 'ClientRead')
