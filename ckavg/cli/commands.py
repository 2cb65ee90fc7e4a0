"""How a verb gets its options: a dataclass of shared ones, joined to the verb's own in one signature."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import typer

from ckavg.average import Plan, carry_out, plan_average
from ckavg.cli.failures import failures
from ckavg.cli.options import Averaging
from ckavg.cli.progress import show_progress
from ckavg.cli.terminal import warn
from ckavg.errors import SettingError
from ckavg.result.record import Averaged
from ckavg.run.opening import as_run, inspect_run
from ckavg.run.values import Run
from ckavg.schemes import SCHEMES, Scheme
from ckavg.schemes.parse import is_scheme, parse_schemes

Options = typing.TypeVar("Options")
Command = Callable[..., None]


def with_options(options_class: type[Options]) -> Callable[[Callable[[Options], None]], Command]:
    """Make a command of a function that takes nothing but shared options."""

    def decorate(function: Callable[[Options], None]) -> Command:
        return _joined(function, options_class, {}, lambda options, _: function(options))

    return decorate


def averaging_command(make_scheme: Callable[..., Scheme]) -> Command:
    """Make a command of a function from hyper-parameters to a scheme; everything else about averaging is shared."""
    own = inspect.signature(make_scheme, eval_str=True).parameters

    def body(options: Averaging, values: Mapping[str, object]) -> None:
        with failures(verbose=options.verbose):
            _average(make_scheme(**values), options)

    return _joined(make_scheme, Averaging, own, body)


def sweeping_command(describe: Callable[..., None]) -> Command:
    """Make a command that takes words, `[SOURCE] SCHEME...`, in the place of a source."""
    own = inspect.signature(describe, eval_str=True).parameters

    def body(options: Averaging, values: Mapping[str, object]) -> None:
        words = list(typing.cast(Iterable[str], values["words"]))
        with failures(verbose=options.verbose):
            if words and not is_scheme(words[0], SCHEMES):
                options = dataclasses.replace(options, source=Path(words.pop(0)))
            if not words:
                raise SettingError(
                    "sweep: no scheme is named.", hint="For example: ckavg sweep . pema:gamma=0.1,0.15 mean"
                )
            _sweep(parse_schemes(words, SCHEMES), options)

    return _joined(describe, Averaging, own, body, takes_source=False)


def _joined(
    described: Callable[..., object],
    options_class: type[Options],
    own: Mapping[str, inspect.Parameter],
    body: Callable[[Options, Mapping[str, object]], None],
    *,
    takes_source: bool = True,
) -> Command:
    hints = typing.get_type_hints(options_class, include_extras=True)
    source, *shared = (
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(options_class)  # type: ignore[arg-type]
    )
    parameters = [*([source] if takes_source else ()), *own.values(), *shared]

    def command(**values: object) -> None:
        of_verb = {name: values.pop(name) for name in own}
        body(options_class(**values), of_verb)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__ = described.__name__
    command.__doc__ = described.__doc__
    return command


def _average(scheme: Scheme, options: Averaging) -> None:
    from ckavg.report import average as report

    run = as_run(inspect_run(options.source, options.selection(scheme.every_from)))
    plan = _plan(run, scheme, options, options.out)
    _warn(plan.warnings)
    if options.dry_run:
        report.print_plan(plan, as_json=options.as_json)
        return
    (result,) = _carry_out([plan], options)
    _warn(result.warnings[len(plan.warnings) :])
    if options.as_json:
        typer.echo(result.to_json())
    elif not options.quiet:
        report.print_summary(result, plan)


def _sweep(schemes: tuple[Scheme, ...], options: Averaging) -> None:
    from ckavg.report import sweep as report

    origins = {scheme.every_from for scheme in schemes}
    if options.every and len(origins) > 1:
        raise SettingError(
            "sweep: with --every, all averages must begin at one burn-in, for updates are counted from it.",
            hint="Sweep each burn-in by itself.",
        )
    run = as_run(inspect_run(options.source, options.selection(origins.pop())))
    base = options.out if options.out is not None else run.source / "averaged"
    plans = [_plan(run, scheme, options, base / scheme.label) for scheme in schemes]
    _warn(dict.fromkeys(warning for plan in plans for warning in plan.warnings))
    if options.dry_run:
        report.print_plans(plans, as_json=options.as_json)
        return
    results = _carry_out(plans, options)
    told = {warning for plan in plans for warning in plan.warnings}
    _warn(dict.fromkeys(each for result in results for each in result.warnings if each not in told))
    report.print_results(results, as_json=options.as_json, quiet=options.quiet)


def _plan(run: Run, scheme: Scheme, options: Averaging, out: Path | None) -> Plan:
    exclude = options.path_exclude or ()
    return plan_average(run, scheme, out=out, dtype=options.dtype, path_exclude=exclude, force=options.force)


def _carry_out(plans: Sequence[Plan], options: Averaging) -> tuple[Averaged, ...]:
    passes = 2 if any(plan.scheme.needs_path for plan in plans) else 1
    with show_progress(passes, quiet=options.quiet) as on_progress:
        return carry_out(
            plans,
            accumulate=options.accumulate,
            device=options.device,
            zero_sigma=options.zero_sigma,
            on_progress=on_progress,
        )


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        warn("warning", warning)
