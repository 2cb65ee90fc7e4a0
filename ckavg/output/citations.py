"""Stage *write*: what a scheme does, in a sentence for readers of a card, and the papers to be cited for it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from ckavg.schemes import BEMA, DEMA, EMA, OUEMA, PEMA, Mean, MomentumEMA, Scheme

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
    DEMA: "It is twice an exponential moving average less the average of that average, which takes out most of its "
    "lag. The weights of early checkpoints may be negative for that reason.",
}

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

_PAPERS: Mapping[type[Scheme], tuple[str, ...]] = {
    PEMA: (_PEMA,),
    EMA: (_PEMA,),
    MomentumEMA: (_SCALING,),
    BEMA: (_BEMA,),
    OUEMA: (_BEMA,),
    DEMA: (_BEMA,),
}


def about(scheme: Scheme) -> str:
    """What the scheme does, for readers who have not heard of it; empty where there is nothing to say."""
    if isinstance(scheme, Mean):
        if scheme.decay in ("none", "linear"):
            return "All of them count alike."
        return "They are weighted so that the mean stands where a decay of the learning rate would have led."
    return _ABOUT.get(type(scheme), "")


def citations(scheme: Scheme) -> str:
    """The papers of the scheme in BibTeX; empty where nothing is averaged."""
    if isinstance(scheme, Mean):
        return "\n\n".join((_SWA, _WSM) if scheme.decay == "none" else (_WSM,))
    return "\n\n".join(_PAPERS.get(type(scheme), ()))
