"""Stage ``demo``: a one-minute training run on a CPU, whose checkpoints there are to average.

In order: :mod:`~ckavg.demo.corpus` (the text), :mod:`~ckavg.demo.model` (the network), :mod:`~ckavg.demo.checkpoint`
(one model on disk), :mod:`~ckavg.demo.train` (the run), :mod:`~ckavg.demo.evaluate` (its judge).

It must not average anything, nor know how that is done: it only makes a run and judges whatever it is shown.
Importing this package must not import torch; import the module that is needed, when it is needed.
"""
