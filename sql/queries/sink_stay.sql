-- Where the COPY sink is in a partition, where it stays until this transaction ends; nothing when another sink is the active one.
SELECT next_offset FROM sink_offsets
WHERE
    topic = %(topic)s AND log_id = %(log_id)s AND partition = %(partition)s
    AND (SELECT s.active = 'copy' FROM sink_state AS s)
FOR UPDATE
