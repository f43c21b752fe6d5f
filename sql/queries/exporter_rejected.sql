-- How many rejected records wait to be replayed?
SELECT count(*) FROM rejected_metrics WHERE replayed_at IS NULL
