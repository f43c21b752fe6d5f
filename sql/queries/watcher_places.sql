-- Where the watcher goes on.
SELECT topic, partition, next_offset, passed
FROM watcher_offsets
