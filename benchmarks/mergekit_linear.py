"""mergekit's own command, `mergekit-yaml`, on a synthetic run: the mean of all checkpoints. Run by mergekit's Python.

It is called as its script calls it, and also timed from inside, to separate imports from work. Settings: equal weights,
`dtype: bfloat16` (sums are float32 anyway), no tokenizer to copy, no progress bars, all cores. On 12 checkpoints of 470
MB with two cores, `--async-write`, smaller shards and `-j 2` made no difference beyond the noise; `-j 1` was slower.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path

from benchmarks.synthetic import weight_files

_OPTIONS = ("--no-copy-tokenizer", "--lazy-unpickle", "--quiet")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mergekit_linear", description=__doc__)
    parser.add_argument("run", type=Path, help="a synthetic run")
    parser.add_argument("out", type=Path, help="directory for the result")
    arguments = parser.parse_args()

    os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: avoid requests to the Hub
    command = importlib.import_module("mergekit.scripts.run_yaml").main
    files = weight_files(arguments.run)
    models = [{"model": str(file.parent.resolve()), "parameters": {"weight": 1.0}} for file in files]
    config = arguments.out.with_suffix(".yml")
    config.parent.mkdir(parents=True, exist_ok=True)
    # JSON is YAML, too.
    config.write_text(json.dumps({"models": models, "merge_method": "linear", "dtype": "bfloat16"}), encoding="utf-8")

    begun = time.perf_counter()
    command([*_OPTIONS, str(config), str(arguments.out)], standalone_mode=False)
    seconds = time.perf_counter() - begun
    config.unlink()
    read = sum(file.stat().st_size for file in files)
    times = {"path": None, "replay": seconds, "total": seconds}
    print(json.dumps({"path_length": None, "bytes_read": read, "seconds": times}))


if __name__ == "__main__":
    main()
