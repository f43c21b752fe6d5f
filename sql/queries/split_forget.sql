-- What was changed in a partition that is being split goes out of its copy, to be copied again.
DELETE FROM {copy} AS c
USING split_noted AS n
WHERE c.device_id = n.device_id AND c.published_at = n.published_at AND c.metric_name = n.metric_name
