"""How a verb gets its options: a dataclass of shared ones, joined to the verb's own in one signature."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping

import typer

from ckavg.average import carry_out, plan_average
from ckavg.cli.failures import failures
from ckavg.cli.options import Averaging
from ckavg.cli.progress import show_progress
from ckavg.cli.terminal import warn
from ckavg.run.opening import as_run, inspect_run
from ckavg.schemes import Scheme

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


def _joined(
    described: Callable[..., object],
    options_class: type[Options],
    own: Mapping[str, inspect.Parameter],
    body: Callable[[Options, Mapping[str, object]], None],
) -> Command:
    hints = typing.get_type_hints(options_class, include_extras=True)
    source, *shared = (
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(options_class)  # type: ignore[arg-type]
    )
    parameters = [source, *own.values(), *shared]

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
    plan = plan_average(
        run,
        scheme,
        out=options.out,
        dtype=options.dtype,
        path_exclude=options.path_exclude or (),
        force=options.force,
    )
    for warning in plan.warnings:
        warn("warning", warning)
    if options.dry_run:
        report.print_plan(plan, as_json=options.as_json)
        return
    with show_progress(2 if scheme.needs_path else 1, quiet=options.quiet) as on_progress:
        result = carry_out(
            plan,
            accumulate=options.accumulate,
            device=options.device,
            zero_sigma=options.zero_sigma,
            on_progress=on_progress,
        )
    for warning in result.warnings[len(plan.warnings) :]:
        warn("warning", warning)
    if options.as_json:
        typer.echo(result.to_json())
    elif not options.quiet:
        report.print_summary(result, plan)
