"""Studies that test the claims of the papers: they save runs, average them with ckavg, and write the outcome.

`python -m benchmarks.evidence.<study>` carries out one study, `python -m benchmarks.evidence` all of them. Each writes
its tables and figures to `docs/evidence/` and puts the tables into `docs/evidence.md`. Random numbers are seeded.
"""
