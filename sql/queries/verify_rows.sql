-- Every row of metrics in columns of fixed width, for a binary COPY: tags as the MD5 of their binary form, in the shape of a uuid.
SELECT
    device_id,
    published_at,
    metric_name,
    value,
    md5(array_send(tags))::uuid,
    created_at
FROM metrics
