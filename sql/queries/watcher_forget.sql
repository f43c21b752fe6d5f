-- Records whose rows were settled long ago; the rejects stay.
DELETE FROM coerced_metrics
WHERE settled_at < now() - make_interval(secs => %(seconds)s)
