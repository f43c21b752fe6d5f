-- Lock the offsets of some partitions, always in the same order, and say whether the COPY sink may write.
SELECT
    o.partition,
    o.next_offset,
    o.log_id,
    (SELECT s.active = 'copy' FROM sink_state AS s) AS active
FROM sink_offsets AS o
WHERE o.topic = %(topic)s AND o.partition = ANY (%(partitions)s)
ORDER BY o.partition
FOR UPDATE OF o
