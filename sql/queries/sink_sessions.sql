-- The sessions of some workers of the COPY sink, what each waits for, and who holds the lock that it waits for.
-- Of other roles' sessions PostgreSQL tells the name and the role only.
SELECT
    a.application_name,
    a.pid,
    a.state,
    concat_ws('/', a.wait_event_type, a.wait_event) AS waits_for,
    coalesce(
        (
            SELECT
                array_agg(
                    format('pid %%s (%%s, role %%s)', b.pid, coalesce(nullif(b.application_name, ''), 'no name'), b.usename)
                    ORDER BY b.pid
                )
            FROM pg_stat_activity AS b
            WHERE b.pid = ANY (pg_blocking_pids(a.pid))
        ),
        '{}'
    ) AS holders
FROM pg_stat_activity AS a
WHERE a.application_name = ANY (%(names)s) AND a.usename = current_user AND a.datname = current_database()
ORDER BY a.application_name, a.pid
