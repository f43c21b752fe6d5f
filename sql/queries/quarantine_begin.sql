-- Note that a quarantine begins; one that ended a month ago is of no use any more.
WITH forgotten AS (
    DELETE FROM quarantines
    WHERE ended_at < now() - interval '30 days'
)

INSERT INTO quarantines (topic, log_id, cause, records) VALUES (%(topic)s, %(log_id)s, %(cause)s, %(records)s)
RETURNING number
