-- The quarantine that has the connector stopped, since when, and how far it is in each partition; a row of nulls at first.
SELECT
    q.number,
    q.log_id,
    q.cause,
    s.partition,
    s.first_offset,
    s.next_offset,
    s.stored,
    s.rejected
FROM quarantines AS q
LEFT JOIN quarantined_stretches AS s ON q.number = s.quarantine
WHERE q.topic = %(topic)s AND q.ended_at IS NULL
ORDER BY s.partition
