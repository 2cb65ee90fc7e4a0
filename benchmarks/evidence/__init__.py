"""Whether averaging does what the papers say: studies that save runs, average them with ckavg, and write what came out.

`python -m benchmarks.evidence.<study>` carries out one study, `python -m benchmarks.evidence` all of them. Each writes
its tables and figures to `docs/evidence/` and puts the tables into `docs/evidence.md`. Random numbers are seeded.
"""
