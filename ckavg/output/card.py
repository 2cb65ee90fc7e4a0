"""The model card of a result, `README.md`, as the Hugging Face Hub reads it. Pure: from the record to text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ckavg import __version__
from ckavg.output.commands import reproduce
from ckavg.output.origin import Origin, is_hub_id
from ckavg.output.record import Record, is_address
from ckavg.schemes import BEMA, DEMA, EMA, OUEMA, PEMA, SCHEMES, Mean, MomentumEMA, PowerEMA, PowerExponentEMA, Scheme

_MARKUP = re.compile(r"[\\`*\[\]<>&|~$]")
_MOST_ROWS, _FIRST_ROWS = 24, 8

_TEMPLATE = """\
---
{metadata}
---

{own}{level} {heading}

{description}

{evaluation}{level}# Recipe

{recipe}

{level}# Checkpoints

{picture}{table}

{level}# To make it again

{again}

`ckavg.json` holds the full record.

{level}# What was checked

- All checkpoints have {alike}, with the same shapes and dtypes.
- {finite}
- `ckavg.json` states the SHA-256 of every other file here, and a checksum of every checkpoint as it was read.
  `ckavg verify .` compares; with `--replay`, where the checkpoints are at hand, it also computes elements of the
  average again.

{warnings}{citation}"""

_PEMA = """\
@misc{pema2025,
  title = {Pathwise {EMA}: An Intrinsic Clock for Weight Averaging},
  author = {{Author names withheld}},
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

_POWER = "It is an average along the run with a power-function profile, whose width is a constant part of the run."

_ABOUT: Mapping[type[Scheme], str] = {
    PEMA: "Each checkpoint is weighted by how far the weights had travelled when it was saved, rather than by the "
    "number of steps: the more they moved, the more is averaged.",
    EMA: "It is an exponential moving average along the run; the older the run grows, the longer it remembers.",
    MomentumEMA: "It is an exponential moving average along the run with a constant momentum, adapted to the steps "
    "between the saved checkpoints.",
    BEMA: "It is an exponential moving average along the run, with a correction that takes out its lag behind "
    "training. The weight of the first may be negative for that reason.",
    OUEMA: "It is an exponential moving average of checkpoints, each of which is first freed of the pull of where "
    "the run began. The weight of the first may be negative for that reason.",
    PowerEMA: _POWER,
    PowerExponentEMA: _POWER,
    DEMA: "It is twice an exponential moving average less the average of that average, which takes out most of its "
    "lag. The weights of early checkpoints may be negative for that reason.",
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


def write_card(record: Record, scheme: Scheme, origin: Origin, *, picture: str | None = None) -> str:
    """The text of `README.md`: metadata, what this is, how it was made and checked, and what to cite.

    Args:
        record: what was done, as it may be published.
        scheme: how.
        origin: what is known of the run besides; a card of the user's comes first, and its fields win.
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
        heading="How the weights were averaged" if own else _escaped(record.output.name),
        description=_description(record, scheme, fields.get("base_model"), origin.repository),
        evaluation=_evaluation(record, level),
        recipe=_recipe(record, scheme),
        picture=f"![The weight of each checkpoint in the average, by optimizer step]({picture})\n\n" if picture else "",
        table=_table(record),
        again=_again(record, scheme, fields.get("base_model")),
        alike="the tensors that were averaged" if record.copied else "the same tensors",
        finite=(
            "NaN and infinity in the checkpoints were let through; where they hold one, so do these weights."
            if record.allow_nonfinite
            else "No checkpoint that was averaged holds NaN or infinity, and neither do these weights."
        ),
        warnings=_warnings(record, level),
        citation=_citation(scheme, level),
    )
    return text.rstrip("\n") + "\n"


def _fields(record: Record, origin: Origin) -> dict[str, Any]:
    """The metadata for the Hub; the user's fields take the place of ours, and null removes one.

    The Hub calls a merge what was made of several models, each of them a base model. The checkpoints of one run have
    one base model between them, and none of them is a model of its own: their average stands where the run's last
    checkpoint would, as a fine-tune of that model, or as an adapter to it.
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
    text = f"{_what(record)}, made with ckavg {__version__} without any further training."
    if record.scheme == "last":
        return text
    text += (
        "\nCheckpoints along a run differ by the noise of training, of which their average holds less. It loads and\n"
        "runs like any of them."
    )
    if repository:
        text += f" The checkpoints are those of [`{repository}`](https://huggingface.co/{repository})."
    if isinstance(base, str) and is_hub_id(base) and base != repository:
        text += f" The run began with [`{base}`](https://huggingface.co/{base})."
    about = _ABOUT.get(type(scheme), "")
    if isinstance(scheme, Mean):
        about = (
            "All of them count alike."
            if scheme.decay in ("none", "linear")
            else "They are weighted so that the mean stands where a decay of the learning rate would have led."
        )
    return f"{text}\n\n{about}" if about else text


def _what(record: Record) -> str:
    step, last = record.outputs[-1].step, record.steps[-1]
    taken = [each for each, weight in zip(record.steps, record.weights, strict=True) if weight]
    if len(taken) == 1:
        return f"The checkpoint of step {taken[0]} of a training run"
    what = f"The average of {len(taken)} checkpoints of one training run, from step {taken[0]} to step\n{step}"
    return what if step == last else f"{what}, as it stood on the way to step {last}"


def _evaluation(record: Record, level: str) -> str:
    """What the user's own command said; in words alone, since nothing tells on which data."""
    told = record.evaluation
    if told is None or told.value is None:
        return ""
    error = "" if told.stderr is None else f" ± {told.stderr:.2g} (standard error)"
    metric = f"{_escaped(told.metric)} " if told.metric else ""
    goal = {"min": "Less is better.\n\n", "max": "More is better.\n\n"}.get(told.goal, "")
    if told.best_of:
        goal += (
            f"These weights were chosen by that number, as the best of {told.best_of} candidates. So it is\n"
            "optimistic, and no estimate of how good they are on other data.\n\n"
        )
    return (
        f"{level}# Evaluation\n\nThis command, with the directory of these weights in the place of `{{dir}}`, printed "
        f"{metric}**{told.value:.10g}**{error}:\n\n    {_in_one_line(told.command)}\n\n{goal}"
    )


def _recipe(record: Record, scheme: Scheme) -> str:
    stated = ", ".join(f"{name} = {value}" for name, value in record.parameters.items())
    lines = [
        f"Scheme: {scheme.title}; {scheme.reference}",
        f"Hyper-parameters: {stated or 'none'}",
        f"Anchor: step {record.anchor_step}; span: {record.span} optimizer steps{_path(record)}",
        f"Accumulated in {record.accumulate}, rounded once",
    ]
    if record.lora == "product":
        lines.append(f"Low-rank adapters: {products_shown(record)}")
    if record.uncorrected:
        lines.append(f"Running statistics, averaged without the correction: {len(record.uncorrected)} tensors")
    if record.copied:
        lines.append(f"Copied from the last checkpoint, since not all have them: {len(record.copied)} tensors")
    return "\n".join(f"- {line}" for line in lines)


def products_shown(record: Record) -> str:
    """How the products of low-rank adapters were averaged, and what was lost where they were cut to a rank."""
    lost = record.output.discarded_energy
    if lost is None:
        return "products s·BA averaged, exact: one product of the sum of all ranks"
    return f"products s·BA averaged and cut to rank {record.rank}, {100 * lost:.2g} % of their energy discarded"


def _path(record: Record) -> str:
    if record.path_length is None:
        return ""
    told = f"; normalized path length ℓ(T) = {record.path_length[-1]:.4f}"
    if record.path_length_error is not None:
        told += f", estimated from {100 * record.sample:g} % of each tensor"
        told += f", standard error {record.path_length_error[-1]:.4f}"
    return told


def _table(record: Record) -> str:
    """Every checkpoint with its weight; of a long run the first and the last ones, and the sum of what is between."""
    columns = record.columns()
    rows = list(zip(*columns.values(), strict=True))
    told = ""
    if len(rows) > _MOST_ROWS:
        between = slice(_FIRST_ROWS, _FIRST_ROWS - _MOST_ROWS)
        left_out = record.weights[between]
        rows[between] = [("…",) * len(columns)]
        told = (
            f"\n\n{len(left_out)} checkpoints in the middle are not shown; together they have the weight "
            f"{sum(left_out):.4f}. `ckavg.json` lists all."
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in [tuple(columns), ("---:",) * len(columns), *rows]) + told


def _again(record: Record, scheme: Scheme, base: object) -> str:
    if type(scheme) not in SCHEMES:
        return f"`{scheme.name}` is a scheme of its author's own: the code that defines it forms this average again."
    where = "" if is_address(record.source) else ", in their directory"
    text = f"From the same checkpoints{where}:\n\n    {reproduce(record, scheme)}"
    if record.anchor_is_init and not is_address(record.selection["init"]):
        known = f", `{base}`" if isinstance(base, str) and is_hub_id(base) else ""
        text += f"\n\n`BASE_MODEL` is the directory of the model that the run began with{known}."
    return text


def _warnings(record: Record, level: str) -> str:
    told = "".join(f"- {_escaped(warning)}\n" for warning in record.warnings)
    return f"{level}# Worth knowing\n\n{told}\n" if told else ""


def _citation(scheme: Scheme, level: str) -> str:
    papers = _PAPERS.get(type(scheme), ())
    if isinstance(scheme, Mean):
        papers = (_SWA, _WSM) if scheme.decay == "none" else (_WSM,)
    bibtex = "\n\n".join(papers)
    return f"{level}# Citation\n\n```bibtex\n{bibtex}\n```" if bibtex else ""


def _escaped(text: str) -> str:
    """A text in one line of Markdown, in which nothing of it has a meaning."""
    return _MARKUP.sub(r"\\\g<0>", _in_one_line(text))


def _in_one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]
