-- Where the readings of a table are: begin of the stretch in which the first one is, and the last one; a few at either end do not count.
SELECT
    (
        SELECT date_trunc(%(width)s, published_at, 'UTC')
        FROM {table}
        WHERE published_at < %(end)s
        ORDER BY published_at
        LIMIT 1 OFFSET %(few)s / 2
    ),
    (
        SELECT published_at
        FROM {table}
        WHERE published_at < %(end)s
        ORDER BY published_at DESC
        LIMIT 1 OFFSET %(few)s / 2
    )
