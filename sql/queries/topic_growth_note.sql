-- Note that partitions were added, once whoever asks first: to be settled at once, and again when no producer can know the former count.
WITH grown AS (
    UPDATE topic_logs SET partitions = %(after)s
    WHERE topic = %(topic)s AND log_id = %(log_id)s AND partitions = %(before)s
    RETURNING topic
)

INSERT INTO topic_growths (topic, log_id, partitions_before, partitions_after, due_at)
SELECT g.topic, %(log_id)s, %(before)s, %(after)s, clock_timestamp() + d.seconds * interval '1 second'
FROM grown AS g, unnest(ARRAY[0, %(seconds)s::double precision]) AS d (seconds)
ORDER BY d.seconds
