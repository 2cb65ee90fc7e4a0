"""Fine-tune a language model with TRL, average its checkpoints at the end, and load the best average if it is better.

    python trainer.py MODEL TEXT OUT [--scheme pema:gamma=0.1,0.2 mean:last=5] [--lora] [--steps 200]

MODEL is a directory or a name on the Hub. TEXT is a file with one example per line; its last tenth is for evaluation.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from ckavg.callback import CheckpointAveraging

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("text", type=Path)
parser.add_argument("out")
parser.add_argument("--scheme", nargs="+", default=["pema", "mean:last=5"])
parser.add_argument("--lora", action="store_true")
parser.add_argument("--steps", type=int, default=200)
asked = parser.parse_args()

texts = Dataset.from_dict({"text": asked.text.read_text().splitlines()}).train_test_split(0.1, shuffle=False)
trainer = SFTTrainer(
    model=asked.model,
    args=SFTConfig(
        output_dir=asked.out,
        max_steps=asked.steps,
        save_steps=max(asked.steps // 20, 1),
        save_total_limit=2,
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
    ),
    train_dataset=texts["train"],
    eval_dataset=texts["test"],
    peft_config=LoraConfig(target_modules="all-linear") if asked.lora else None,
)
averaging = CheckpointAveraging(trainer, *asked.scheme, load_best=True)
trainer.add_callback(averaging)
trainer.train()
if trainer.is_world_process_zero():
    for name, value in averaging.values.items():
        print(f"{name:20} {value:.4f}")
    for result in averaging.results:
        print(result.directory)
