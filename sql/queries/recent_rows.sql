-- How many readings were stored within the last seconds, and how many seconds ago the newest of them (null: none)?
SELECT count(*), extract(EPOCH FROM now() - max(created_at))::double precision
FROM metrics
WHERE
    created_at > now() - make_interval(secs => %(seconds)s)
    -- What the future holds was stored before the clock was set back.
    AND created_at <= now()
