-- Which sink stores the readings, how many sessions the COPY sink has, and its offset in each partition of a topic; then of which logs these are.
-- Offsets of another log than the topic's name stands for, as far as that was noticed, are none.
-- One row of nulls when there is no offset.
SELECT
    s.active,
    (
        SELECT count(*)
        FROM pg_stat_activity AS a
        WHERE a.datname = current_database() AND a.application_name LIKE 'metrics-pipeline sink%%'
    ),
    o.partition,
    o.next_offset,
    coalesce(l.log_id, ''),
    s.connector_log
FROM sink_state AS s
LEFT JOIN LATERAL (
    SELECT t.log_id FROM topic_logs AS t WHERE t.topic = %(topic)s ORDER BY t.noticed_at DESC LIMIT 1
) AS l ON true
LEFT JOIN sink_offsets AS o ON o.topic = %(topic)s AND o.log_id IN ('', coalesce(l.log_id, o.log_id))
ORDER BY o.partition
