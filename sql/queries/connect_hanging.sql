-- The connector's transactions that have been open for some seconds, what each waits for, and who holds the lock that it waits for.
-- A holder that is a session of the connector itself is left out: it stands in a row of its own.
SELECT
    a.pid,
    extract(EPOCH FROM clock_timestamp() - a.xact_start)::double precision AS seconds,
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
            WHERE
                b.pid = ANY (pg_blocking_pids(a.pid))
                AND NOT (b.application_name = %(application)s AND b.usename = current_user)
        ),
        '{}'
    ) AS holders
FROM pg_stat_activity AS a
WHERE
    a.application_name = %(application)s
    AND a.usename = current_user
    AND a.datname = current_database()
    AND a.xact_start < clock_timestamp() - %(seconds)s * interval '1 second'
ORDER BY a.xact_start
