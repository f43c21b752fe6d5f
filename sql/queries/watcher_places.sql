-- Where the watcher goes on in this log of the topic, and in other topics.
SELECT topic, partition, next_offset, passed
FROM watcher_offsets
WHERE log_id IN ('', %(log_id)s) OR topic <> %(topic)s
