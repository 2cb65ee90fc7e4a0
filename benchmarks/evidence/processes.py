"""Runs of a study in parallel, each in a process with one thread of torch.

One thread sums in the same order on any number of cores.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch


def single_threaded(processes: int = 2) -> ProcessPoolExecutor:
    """A pool of this many new processes."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,))
