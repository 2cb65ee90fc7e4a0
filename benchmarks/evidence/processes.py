"""Runs of a study side by side, each in a process with one thread of torch.

The processes are the parallelism, and one thread sums in the same order however many cores there are.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch


def single_threaded(processes: int = 2) -> ProcessPoolExecutor:
    """A pool of so many processes, which begin afresh."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,))
