-- Rejected records that wait, in the order of their places behind one place.
-- None that was rejected after the replay began: a record that is refused again would be published for ever.
SELECT log_id, partition, "offset", key, payload
FROM rejected_metrics
WHERE
    topic = %(topic)s
    AND (partition, "offset", log_id) > (%(partition)s, %(offset)s, %(log_id)s)
    AND replayed_at IS NULL
    AND rejected_at <= %(begun)s
    AND (%(reason)s::text IS NULL OR reason = %(reason)s)
    AND (%(only_partition)s::integer IS NULL OR (partition = %(only_partition)s AND "offset" = %(only_offset)s))
ORDER BY partition, "offset", log_id
LIMIT %(limit)s
