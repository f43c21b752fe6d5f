-- Delete rejected records from before a moment whose partition of the topic begins behind them.
DELETE FROM rejected_metrics AS r
USING unnest(%(partitions)s::integer[], %(lows)s::bigint[]) AS p (partition, low)
WHERE r.topic = %(topic)s AND r.partition = p.partition AND r."offset" < p.low AND r.rejected_at < %(before)s
