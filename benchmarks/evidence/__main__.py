"""All studies, one after the other: `python -m benchmarks.evidence`, which is what `make reproduce` runs."""

from __future__ import annotations

import sys

from benchmarks.evidence import adapters, language_model, parabola, pretraining, quadratic, search, small_model

if __name__ == "__main__":
    for study in (quadratic, parabola, pretraining, small_model, adapters):
        study.main()
    sys.exit(language_model.main() or search.main())
