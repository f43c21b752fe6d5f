-- Delete rejected records from before a moment whose partition of the topic begins behind them, or that stood in a former log.
DELETE FROM rejected_metrics AS r
USING unnest(%(partitions)s::integer[], %(lows)s::bigint[]) AS p (partition, low)
WHERE
    r.topic = %(topic)s
    AND r.rejected_at < %(before)s
    AND (r.log_id NOT IN ('', %(log_id)s) OR (r.partition = p.partition AND r."offset" < p.low))
