-- Note where the partitions stand, once it is due: what the sink has to pass, and from where it then reads again.
UPDATE topic_growths SET passed = %(passed)s::bigint [], begins = %(begins)s::bigint []
WHERE growth_id = %(growth_id)s AND passed IS NULL
