-- The sink went back and stores these records once more: their rows are looked at again when it has passed them.
UPDATE coerced_metrics
SET settled_at = NULL, looks = 0, due_at = now()
WHERE topic = %(topic)s AND partition = %(partition)s AND "offset" >= %(offset)s AND (looks > 0 OR settled_at IS NOT NULL)
