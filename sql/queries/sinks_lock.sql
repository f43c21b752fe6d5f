-- Wait until nobody else stops or starts a sink; for as long as the session lives. Whoever asks without waiting uses the same number.
SELECT pg_advisory_lock(hashtextextended('metrics-pipeline sinks', 0))
