-- By minute, what comes one by one and what goes.
INSERT INTO summary_minutes (minute, rows)
SELECT minute, sum(CASE WHEN removed THEN -rows ELSE rows END)
FROM summary_delta
GROUP BY minute
