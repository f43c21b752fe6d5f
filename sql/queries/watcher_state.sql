-- How many sessions the watcher has, how many records it has still to look at, the seconds since it said so, and rows to put right.
SELECT
    (
        SELECT count(*)
        FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'metrics-pipeline watcher'
    ),
    (SELECT sum(waiting)::bigint FROM watcher_offsets),
    (SELECT extract(EPOCH FROM now() - max(updated_at))::double precision FROM watcher_offsets),
    (SELECT count(*) FROM coerced_metrics WHERE settled_at IS NULL AND looks = 0)
