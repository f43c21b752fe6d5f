-- Who holds the producer's lock, and since when is it connected?
SELECT activity.application_name, activity.pid, activity.backend_start
FROM pg_locks AS held
INNER JOIN pg_stat_activity AS activity ON activity.pid = held.pid
WHERE
    held.locktype = 'advisory'
    AND held.granted
    AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    -- A lock with one bigint key shows its two halves and the number 1.
    AND held.objsubid = 1
    AND (held.classid::bigint << 32 | held.objid::bigint) = %(key)s
