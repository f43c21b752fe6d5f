-- How far the COPY sink is, once its transactions that are under way have ended, and kept there until this one ends.
SELECT partition, next_offset, log_id
FROM sink_offsets
WHERE topic = %(topic)s
ORDER BY partition
FOR UPDATE
