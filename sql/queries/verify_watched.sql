-- Is there a watcher that has still to look at records before these offsets, or at rows that Kafka Connect made of bad ones among them?
SELECT
    EXISTS (
        SELECT FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'metrics-pipeline watcher'
    )
    AND EXISTS (
        SELECT FROM unnest(%(partitions)s::integer [], %(ends)s::bigint []) AS e (partition, stop)
        LEFT JOIN watcher_offsets AS w ON w.topic = %(topic)s AND w.partition = e.partition
        WHERE
            w.next_offset < e.stop
            OR EXISTS (
                SELECT FROM coerced_metrics AS c
                WHERE
                    c.topic = %(topic)s AND c.partition = e.partition AND c."offset" < e.stop
                    AND c.settled_at IS NULL AND c.looks = 0
            )
    )
