-- Did a producer run report within the last seconds?
SELECT EXISTS (SELECT FROM producer_runs WHERE updated_at BETWEEN now() - make_interval(secs => %(seconds)s) AND clock_timestamp())
