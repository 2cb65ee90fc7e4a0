"""Study: averages of runs on a noisy quadratic, against theory; `python -m benchmarks.evidence.quadratic`."""

from __future__ import annotations

import dataclasses
import itertools

from benchmarks.evidence.figures import draw
from benchmarks.evidence.quadratic_cases import ESTIMATORS, SCHEMES, STARTS, Case, Setting, study, weights_of_all
from benchmarks.evidence.quadratic_tables import curves_of, panels_of, tables_of
from benchmarks.evidence.tables import publish, write_record


def main() -> None:
    """Run every case, print its distance from theory, and write tables, figures and settings."""
    setting = Setting()
    weights = weights_of_all(setting)
    cases: list[Case] = []
    for place, (start, condition) in enumerate(itertools.product(STARTS, setting.conditions)):
        cases += study(condition, start, setting, setting.seed + place, weights)
        for case in cases[-len(setting.intervals) :]:
            z = ", ".join(f"{name} {case.z(name, setting.steps):+.2f}" for name in ESTIMATORS)
            print(f"{start}, condition {condition}, every {case.every}: z at the end: {z}", flush=True)
    publish(tables_of(cases))
    for every, _ in setting.intervals:
        draw(f"quadratic-every-{every}", panels_of(curves_of(cases), every), columns=4)
    record = {
        **dataclasses.asdict(setting),
        "step_size": cases[0].process.step_size,
        "noise": cases[0].process.noise,
        "optimum": cases[0].process.optimum,
        "distance_in_every_direction": STARTS,
        "schemes": {name: repr(scheme) for name, scheme in SCHEMES.items()},
    }
    write_record("quadratic", record)


if __name__ == "__main__":
    main()
