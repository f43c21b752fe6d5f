-- How many records of each partition does the next quarantine take, given how long ago the last one ended?
SELECT
    coalesce((
        SELECT
            CASE
                WHEN q.ended_at > now() - make_interval(secs => %(closely)s)
                    THEN least(least(q.records, %(most)s) * %(factor)s, %(most)s)
                ELSE %(fewest)s
            END
        FROM quarantines AS q
        WHERE q.topic = %(topic)s AND q.ended_at IS NOT NULL
        ORDER BY q.ended_at DESC
        LIMIT 1
    ), %(fewest)s)::bigint
