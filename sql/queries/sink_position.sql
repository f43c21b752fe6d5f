-- Which sink stores the readings, how many sessions the COPY sink has, and its offset in each partition of a topic.
-- One row of nulls when there is no offset.
SELECT
    s.active,
    (
        SELECT count(*)
        FROM pg_stat_activity AS a
        WHERE a.datname = current_database() AND a.application_name LIKE 'metrics-pipeline sink%%'
    ),
    o.partition,
    o.next_offset
FROM sink_state AS s
LEFT JOIN sink_offsets AS o ON o.topic = %(topic)s
ORDER BY o.partition
