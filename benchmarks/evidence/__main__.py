"""All studies, one after another: `python -m benchmarks.evidence`, as run by `make reproduce`."""

from __future__ import annotations

import sys

from benchmarks.evidence import adapters, language_model, parabola, pretraining, quadratic, search, small_model

if __name__ == "__main__":
    for study in (quadratic, parabola, pretraining, small_model, adapters):
        study.main()
    sys.exit(language_model.main() or search.main())
