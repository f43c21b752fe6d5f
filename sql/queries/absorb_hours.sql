-- From which slot to which one is there something to be folded in?
SELECT min(slot), max(slot)
FROM (
    SELECT slot FROM summary_delta
    UNION ALL
    SELECT slot FROM summary_pending
) AS slots
