-- Which sink stores the readings, and the COPY sink's offset in each partition of a topic; one row of nulls when there is none.
SELECT s.active, o.partition, o.next_offset
FROM sink_state AS s
LEFT JOIN sink_offsets AS o ON o.topic = %(topic)s
