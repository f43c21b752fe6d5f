-- What the readings of a table add up to: how many, and sums of 60 bits of MD5 over keys, and over each other column with its key.
SELECT
    count(*) AS rows,
    coalesce(sum(('x0' || left(md5(key), 15))::bit(64)::bigint), 0) AS keys,
    coalesce(sum(('x0' || left(md5(key || encode(float8send(value), 'hex')), 15))::bit(64)::bigint), 0) AS "values",
    coalesce(sum(('x0' || left(md5(key || encode(array_send(tags), 'hex')), 15))::bit(64)::bigint), 0) AS tags,
    coalesce(sum(('x0' || left(md5(key || encode(timestamptz_send(created_at), 'hex')), 15))::bit(64)::bigint), 0) AS created_at
FROM (
    SELECT
        device_id::text || encode(timestamptz_send(published_at), 'hex') || metric_name::text AS key,
        value,
        tags,
        created_at
    FROM {partition}
    -- The key is made once a row.
    OFFSET 0
) AS readings
