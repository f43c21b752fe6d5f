-- Move the COPY sink in one partition, perhaps to another log, unless it is not where it was expected or not the active sink.
UPDATE sink_offsets
SET log_id = %(log_id)s, next_offset = %(offset)s, last_timestamp = NULL, updated_at = now()
WHERE
    topic = %(topic)s
    AND partition = %(partition)s
    AND log_id = %(expected_log)s
    AND next_offset = %(expected)s
    AND (SELECT s.active = 'copy' FROM sink_state AS s)
