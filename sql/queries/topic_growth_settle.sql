-- A growth is settled, once.
UPDATE topic_growths SET settled_at = clock_timestamp()
WHERE growth_id = %(growth_id)s AND settled_at IS NULL
