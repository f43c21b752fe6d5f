-- Stretches of time, each as wide as a partition, that hold many readings of a table.
SELECT date_trunc(%(width)s, published_at, 'UTC') AS low
FROM {table}
WHERE published_at < %(end)s
GROUP BY low
HAVING count(*) > %(few)s
ORDER BY low
