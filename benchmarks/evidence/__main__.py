"""All studies, one after the other: `python -m benchmarks.evidence`, which is what `make reproduce` runs."""

from __future__ import annotations

from benchmarks.evidence import parabola, pretraining, quadratic

if __name__ == "__main__":
    for study in (quadratic, parabola, pretraining):
        study.main()
