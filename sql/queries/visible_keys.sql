-- Which of the sampled keys can be read already? (Places in the arrays, from 1.)
SELECT sample.place
FROM unnest(%(devices)s::uuid[], %(times)s::timestamptz[], %(metrics)s::smallint[])
    WITH ORDINALITY AS sample (device_id, published_at, metric_name, place)
INNER JOIN metrics USING (device_id, published_at, metric_name)
