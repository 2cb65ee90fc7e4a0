"""The model card of a result, `README.md`, as the Hugging Face Hub reads it. Pure: from the record to text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ckavg import __version__
from ckavg.output.commands import reproduce
from ckavg.output.origin import Origin, is_hub_id
from ckavg.output.record import Evaluation, Record, is_address
from ckavg.schemes import BEMA, DEMA, EMA, OUEMA, PEMA, SCHEMES, Mean, MomentumEMA, PowerEMA, PowerExponentEMA, Scheme

_MARKUP = re.compile(r"[\\`*\[\]<>&|~$]")
_MOST_ROWS, _FIRST_ROWS = 24, 8

_TEMPLATE = """\
---
{metadata}
---

{own}{level} {heading}

{description}

{level}# Use

From this directory; from elsewhere, put its path or its name on the Hub in place of `.`:

```python
{usage}
```

{evaluation}{level}# How it was averaged

{recipe}

{terms}{picture}{table}

{level}# Reproduce

{again}

`ckavg.json` holds the full record.

{level}# Checks

- All checkpoints have {alike}, with the same shapes and dtypes.
- {finite}
- `ckavg verify .` compares the files with the SHA-256 in `ckavg.json`; with `--replay`, if the checkpoints are at hand,
  it also computes elements of the average again.

{warnings}{citation}"""

_PEMA = """\
@misc{pema2025,
  title = {Pathwise {EMA}: An Intrinsic Clock for Weight Averaging},
  year = {2025},
  note = {Under review for the Workshop on High-dimensional Learning Dynamics}
}"""

_BEMA = """\
@misc{block2025bema,
  title = {{EMA} Without the Lag: Bias-Corrected Iterate Averaging Schemes},
  author = {Block, Adam and Zhang, Cyril},
  year = {2025},
  eprint = {2508.00180},
  archivePrefix = {arXiv}
}"""

_SCALING = """\
@inproceedings{busbridge2023scale,
  title = {How to Scale Your {EMA}},
  author = {Busbridge, Dan and Ramapuram, Jason and Ablin, Pierre and Likhomanenko, Tatiana and Dhekane, Eeshan Gunesh
            and Suau, Xavier and Webb, Russ},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {36},
  year = {2023},
  eprint = {2307.13813},
  archivePrefix = {arXiv}
}"""

_EDM2 = """\
@inproceedings{karras2024edm2,
  title = {Analyzing and Improving the Training Dynamics of Diffusion Models},
  author = {Karras, Tero and Aittala, Miika and Lehtinen, Jaakko and Hellsten, Janne and Aila, Timo and Laine, Samuli},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024},
  eprint = {2312.02696},
  archivePrefix = {arXiv}
}"""

_SWA = """\
@inproceedings{izmailov2018swa,
  title = {Averaging Weights Leads to Wider Optima and Better Generalization},
  author = {Izmailov, Pavel and Podoprikhin, Dmitrii and Garipov, Timur and Vetrov, Dmitry and Wilson, Andrew Gordon},
  booktitle = {Conference on Uncertainty in Artificial Intelligence},
  year = {2018},
  eprint = {1803.05407},
  archivePrefix = {arXiv}
}"""

_WSM = """\
@misc{tian2025wsm,
  title = {{WSM}: Decay-Free Learning Rate Schedule via Checkpoint Merging for {LLM} Pre-training},
  author = {Tian, Changxin and Wang, Jiapeng and Zhao, Qian and Chen, Kunlong and Liu, Jia and Liu, Ziqi and Mao, Jiaxin
            and Zhao, Wayne Xin and Zhang, Zhiqiang and Zhou, Jun},
  year = {2025},
  eprint = {2507.17634},
  archivePrefix = {arXiv}
}"""

_POWER = (
    "The weight of a checkpoint grows as a power of its step, so that the average covers the same fraction of a run of "
    "any length."
)
_FADES = "It is an exponential moving average: older checkpoints fade"
_NEGATIVE = "For that reason, early checkpoints may have negative weights."

_ABOUT: Mapping[type[Scheme], str] = {
    PEMA: f"{_FADES}. How fast depends on how far the weights moved, not on the number of steps: the farther they "
    "moved, the more checkpoints are averaged.",
    EMA: f"{_FADES}, and they fade more slowly the longer the run is.",
    MomentumEMA: f"{_FADES}, by the same factor with every optimizer step.",
    BEMA: f"{_FADES}. Such an average lags behind training; a multiple of the way from the first checkpoint to the "
    f"last is added to make up for it. {_NEGATIVE}",
    OUEMA: f"{_FADES}. Each checkpoint is first corrected for the pull of the starting point. {_NEGATIVE}",
    PowerEMA: _POWER,
    PowerExponentEMA: _POWER,
    DEMA: f"{_FADES}. Such an average lags behind training; averaging it once more shows by how much, and that much is "
    f"taken out. {_NEGATIVE}",
}

_PAPERS: Mapping[type[Scheme], tuple[str, ...]] = {
    PEMA: (_PEMA,),
    EMA: (_PEMA,),
    MomentumEMA: (_SCALING,),
    BEMA: (_BEMA,),
    OUEMA: (_BEMA,),
    DEMA: (_BEMA,),
    PowerEMA: (_EDM2,),
    PowerExponentEMA: (_EDM2,),
}


def write_card(record: Record, scheme: Scheme, origin: Origin, usage: str, *, picture: str | None = None) -> str:
    """The text of `README.md`: metadata, what the model is, how to use it, how it was made and checked, what to cite.

    Args:
        record: what was done, as it may be published.
        scheme: how.
        origin: what is known of the run besides; a card of the user's comes first, and its fields win.
        usage: Python code that loads the result.
        picture: name of the file beside the card that shows the weights; None: there is none.
    """
    from huggingface_hub.repocard_data import ModelCardData  # takes a while

    fields = _fields(record, origin)
    own = origin.own.text.strip("\n") if origin.own is not None else ""
    level = "##" if own else "#"
    text = _TEMPLATE.format(
        metadata=ModelCardData(**fields).to_yaml(),
        own=f"{own}\n\n" if own else "",
        level=level,
        heading="Average of checkpoints" if own else _escaped(record.output.name),
        description=_description(record, scheme, fields.get("base_model"), origin.repository),
        usage=usage,
        evaluation=_evaluation(record, level),
        recipe=_recipe(record, scheme),
        picture=f"![The weight of each checkpoint in the average, by optimizer step]({picture})\n\n" if picture else "",
        table=_table(record),
        terms=_terms(record),
        again=_again(record, scheme, fields.get("base_model")),
        alike="the tensors that were averaged" if record.copied else "the same tensors",
        finite=(
            "NaN and infinity were allowed; where an averaged checkpoint holds one, so do these weights."
            if record.allow_nonfinite
            else "No averaged checkpoint holds NaN or infinity, and neither do these weights."
        ),
        warnings=_warnings(record, level),
        citation=_citation(scheme, level),
    )
    return text.rstrip("\n") + "\n"


def _fields(record: Record, origin: Origin) -> dict[str, Any]:
    """The metadata for the Hub; the user's fields replace ours, and null removes one.

    To the Hub, a merge has several base models. The checkpoints of one run share one base model, and none of them is a
    model of its own: their average takes the place of the last checkpoint, as a fine-tune of that model or an adapter
    to it.
    """
    fields = dict(origin.metadata)
    fields["tags"] = ["checkpoint-averaging", record.scheme, *fields.get("tags", ())]
    own = origin.own.metadata if origin.own is not None else {}
    replaced = {"license": ("license_name", "license_link"), "base_model": ("base_model_relation",)}
    for name in (name for stated, names in replaced.items() if stated in own for name in names):
        fields.pop(name, None)
    fields |= own
    if isinstance(fields.get("base_model"), str):
        fields.setdefault("base_model_relation", "adapter" if origin.is_adapter else "finetune")
    return {name: value for name, value in fields.items() if value is not None}


def _description(record: Record, scheme: Scheme, base: object, repository: str) -> str:
    text = f"{_what(record)}, made with ckavg {__version__} without further training."
    if record.scheme == "last":
        return text
    text += (
        "\n\nTraining saves the weights of a model from time to time: its checkpoints. Each carries noise from the\n"
        "last batches before it. The noise differs from checkpoint to checkpoint, so an average holds less of it,\n"
        "and is often the better model. It has the size and the architecture of a checkpoint, and is used like one."
    )
    if repository:
        text += f" The checkpoints are those of [`{repository}`](https://huggingface.co/{repository})."
    if isinstance(base, str) and is_hub_id(base) and base != repository:
        text += f" Training began with [`{base}`](https://huggingface.co/{base})."
    about = _ABOUT.get(type(scheme), "")
    if isinstance(scheme, Mean):
        about = (
            "All checkpoints count alike."
            if scheme.decay in ("none", "linear")
            else "The weights imitate a decay of the learning rate at the end of training."
        )
    return f"{text}\n\n{about}" if about else text


def _what(record: Record) -> str:
    step, last = record.outputs[-1].step, record.steps[-1]
    taken = [each for each, weight in zip(record.steps, record.weights, strict=True) if weight]
    if len(taken) == 1:
        return f"The checkpoint of step {taken[0]} of a training run"
    what = f"The weighted average of {len(taken)} checkpoints of one training run, from step {taken[0]} to step\n{step}"
    return what if step == last else f"{what}, a snapshot on the way to step {last}"


def _evaluation(record: Record, level: str) -> str:
    """What the user's own command measured; in words alone, since nothing names the task and the data for the Hub."""
    found = record.evaluation
    if found is None or found.value is None:
        return ""
    metric = _escaped(found.metric) if found.metric else "value"
    rows = [(f"**this {'model' if record.scheme == 'last' else 'average'}**", found.value, found.stderr)]
    if found.last_value is not None:
        rows.insert(0, ("last checkpoint of the run", found.last_value, found.last_stderr))
    table = "\n".join(f"| {name} | {_value(value, error)} |" for name, value, error in rows)
    notes = [each for each in (_gain(found), f"Measured on {_escaped(found.data)}." if found.data else "") if each]
    if any(error is not None for *_, error in rows):
        notes.append("± is the standard error.")
    if found.best_of:
        notes.append(
            f"This average was chosen by this number, as the best of {found.best_of} candidates, so the number is "
            "optimistic: it is no estimate for other data."
        )
    return (
        f"{level}# Evaluation\n\n| | {metric} |\n|---|---:|\n{table}\n\n{' '.join(notes)}{' ' if notes else ''}"
        f"The command, with the directory of the model in place of `{{dir}}`:\n\n    {_in_one_line(found.command)}\n\n"
    )


def _gain(found: Evaluation) -> str:
    """From the last checkpoint to the average, in words; without the former, which way is better."""
    less_is_better = {"min": True, "max": False}.get(found.goal)
    better = "" if less_is_better is None else f"{'Less' if less_is_better else 'More'} is better."
    if found.last_value is None or found.value is None:
        return better
    change = found.value - found.last_value
    if change == 0:
        return f"Averaging changed nothing. {better}".rstrip()
    name = _escaped(found.metric) if found.metric else "the value"
    how = f"{'lowered' if change < 0 else 'raised'} {name} from {found.last_value:.4g} to {found.value:.4g}"
    part = f" (by {100 * abs(change / found.last_value):.2g} %)" if found.last_value else ""
    verdict = "" if less_is_better is None else f", which is {'better' if (change < 0) is less_is_better else 'worse'}"
    return f"Averaging {how}{part}{verdict}."


def _value(value: float, error: float | None) -> str:
    return f"{value:.6g}" if error is None else f"{value:.6g} ± {error:.2g}"


def _recipe(record: Record, scheme: Scheme) -> str:
    stated = ", ".join(f"{name} = {value}" for name, value in record.parameters.items())
    lines = [
        f"Scheme: {scheme.title}; {scheme.reference}",
        f"Hyper-parameters: {stated or 'none'}",
        f"Anchor, where the average begins: step {record.anchor_step}; span: {record.span} steps{_path(record)}",
        f"Accumulated in {record.accumulate}, rounded once",
    ]
    if record.lora == "product":
        lines.append(f"Low-rank adapters: {products_shown(record)}")
    if record.uncorrected:
        lines.append(f"Running statistics averaged without the correction: {len(record.uncorrected)} tensors")
    if record.copied:
        lines.append(f"Copied from the last checkpoint, since not all have them: {len(record.copied)} tensors")
    return "\n".join(f"- {line}" for line in lines)


def _terms(record: Record) -> str:
    """What the columns of the table mean."""
    if record.scheme == "last":
        return ""
    lines = []
    if record.path_length is not None:
        lines.append(
            "**ℓ**, the normalized path length, is how far the weights had moved by that step: the distances from "
            "checkpoint to checkpoint, added up and averaged over all parameters, in units of each tensor's standard "
            "deviation at the anchor."
        )
    if record.scheme != "weights":
        lines.append(
            "**β** is the share that a checkpoint takes of the average when it is added: average ← (1 − β) · average + "
            "β · checkpoint. Later checkpoints dilute it; what remains at the end is its **weight**."
        )
    if record.alphas is not None:
        lines.append("**α** is the strength of the correction at that step.")
    return " ".join(lines) + "\n\n" if lines else ""


def products_shown(record: Record) -> str:
    """How the products of low-rank adapters were averaged, and what was lost where they were cut to a rank."""
    lost = record.output.discarded_energy
    if lost is None:
        return "products s·BA averaged, exact: one product of the sum of all ranks"
    return f"products s·BA averaged and cut to rank {record.rank}, {100 * lost:.2g} % of their energy discarded"


def _path(record: Record) -> str:
    if record.path_length is None:
        return ""
    length = f"; normalized path length ℓ = {record.path_length[-1]:.4f}"
    if record.path_length_error is not None:
        length += f", estimated from {100 * record.sample:g} % of each tensor"
        length += f", standard error {record.path_length_error[-1]:.4f}"
    return length


def _table(record: Record) -> str:
    """Every checkpoint with its weight; of a long run the first and the last ones, and the sum of the others."""
    columns = record.columns()
    rows = list(zip(*columns.values(), strict=True))
    note = ""
    if len(rows) > _MOST_ROWS:
        between = slice(_FIRST_ROWS, _FIRST_ROWS - _MOST_ROWS)
        left_out = record.weights[between]
        rows[between] = [("…",) * len(columns)]
        note = (
            f"\n\n{len(left_out)} checkpoints in the middle are not shown; together they have the weight "
            f"{sum(left_out):.4f}. `ckavg.json` lists all."
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in [tuple(columns), ("---:",) * len(columns), *rows]) + note


def _again(record: Record, scheme: Scheme, base: object) -> str:
    if type(scheme) not in SCHEMES:
        return f"`{scheme.name}` is a custom scheme: only the code that defines it makes this average again."
    where = "" if is_address(record.source) else ", in the directory of the checkpoints"
    text = f"This command makes the same average again{where}:\n\n    {reproduce(record, scheme)}"
    if record.anchor_is_init and not is_address(record.selection["init"]):
        known = f", `{base}`" if isinstance(base, str) and is_hub_id(base) else ""
        text += f"\n\n`BASE_MODEL` is the directory of the model that training began with{known}."
    return text


def _warnings(record: Record, level: str) -> str:
    warnings = "".join(f"- {_escaped(warning)}\n" for warning in record.warnings)
    return f"{level}# Warnings\n\n{warnings}\n" if warnings else ""


def _citation(scheme: Scheme, level: str) -> str:
    papers = _PAPERS.get(type(scheme), ())
    if isinstance(scheme, Mean):
        papers = (_SWA, _WSM) if scheme.decay == "none" else (_WSM,)
    bibtex = "\n\n".join(papers)
    return f"{level}# Citation\n\n```bibtex\n{bibtex}\n```" if bibtex else ""


def _escaped(text: str) -> str:
    """A text in one line of Markdown, without any markup."""
    return _MARKUP.sub(r"\\\g<0>", _in_one_line(text))


def _in_one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]
