-- The growth that was settled last: when it is another one than before, offsets were set back.
SELECT coalesce(max(growth_id), 0) FROM topic_growths WHERE topic = %(topic)s AND settled_at IS NOT NULL
