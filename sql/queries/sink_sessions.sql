-- The sessions of some workers of the COPY sink, what each waits for, and who holds the lock that it waits for in the end.
-- Who holds it may wait himself, in front of it in the queue: then it is for him that both wait. A circle has no end, and is PostgreSQL's.
-- Of other roles' sessions PostgreSQL tells the name and the role only.
WITH RECURSIVE ours AS (
    SELECT a.application_name, a.pid, a.state, concat_ws('/', a.wait_event_type, a.wait_event) AS waits_for
    FROM pg_stat_activity AS a
    WHERE a.application_name = ANY (%(names)s) AND a.usename = current_user AND a.datname = current_database()
), waits AS (
    SELECT o.pid AS waiter, h.pid AS holder
    FROM ours AS o CROSS JOIN unnest(pg_blocking_pids(o.pid)) AS h (pid)
    UNION
    SELECT w.waiter, h.pid
    FROM waits AS w CROSS JOIN unnest(pg_blocking_pids(w.holder)) AS h (pid)
)
SELECT
    o.application_name,
    o.pid,
    o.state,
    o.waits_for,
    coalesce(
        (
            SELECT
                array_agg(
                    format('pid %%s (%%s, role %%s)', b.pid, coalesce(nullif(b.application_name, ''), 'no name'), b.usename)
                    ORDER BY b.pid
                )
            FROM waits AS w
            INNER JOIN pg_stat_activity AS b ON w.holder = b.pid
            WHERE w.waiter = o.pid AND cardinality(pg_blocking_pids(w.holder)) = 0
        ),
        '{}'
    ) AS holders
FROM ours AS o
ORDER BY o.application_name, o.pid
