-- Does nobody else stop or start a sink? Then nobody else may, for as long as the session lives.
SELECT pg_try_advisory_lock(hashtextextended('metrics-pipeline sinks', 0))
