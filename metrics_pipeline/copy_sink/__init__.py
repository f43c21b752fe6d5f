"""The COPY sink: from the topic into PostgreSQL at the speed of COPY, each record stored once or rejected by name.

worker ── consumes, keeps positions ──> decode (canonical, else metric.decode) ──> Batch
   └──── hands batches to ──> store ── one transaction: offsets by compare-and-set, COPY or upsert, rejects
supervisor ── runs and restarts the workers, sums up their counts, answers /health and /metrics
"""
