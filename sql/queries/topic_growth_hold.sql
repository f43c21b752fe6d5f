-- Who settles a growth keeps it until the transaction ends; nobody who comes meanwhile waits for that.
SELECT growth_id FROM topic_growths
WHERE growth_id = %(growth_id)s AND settled_at IS NULL
FOR UPDATE SKIP LOCKED
