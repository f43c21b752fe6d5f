-- Which sink stores the readings, and the COPY sink's offset in each partition of a topic; one row of nulls when there is none.
SELECT s.active, o.partition, o.next_offset
FROM sink_state AS s
LEFT JOIN LATERAL (
    SELECT t.log_id FROM topic_logs AS t WHERE t.topic = %(topic)s ORDER BY t.noticed_at DESC LIMIT 1
) AS l ON true
LEFT JOIN sink_offsets AS o ON o.topic = %(topic)s AND o.log_id IN ('', coalesce(l.log_id, o.log_id))
