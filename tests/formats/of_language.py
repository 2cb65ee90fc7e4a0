"""Language models, trained by the trainers themselves or saved by their savers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.formats.trained import IDS, Trained, drift, llama, logits, tokenizer

STEPS = (1, 2, 3)
ARGUMENTS: dict[str, Any] = {
    "max_steps": 3,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "logging_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
TEXTS = ("a b c d e f", "c d e f g h", "g a h b c d", "k l m n o p")


def watch(trained: Trained) -> Any:
    """A callback that remembers what is saved."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, *, model: Any, **_: object) -> None:
            trained.keep(Path(args.output_dir) / f"checkpoint-{state.global_step}", model)

    return Watch()


def run_trainer(model: Any, trainer: Any) -> Trained:
    """Train, and keep a model like the one that is trained: trainers put functions of their own into theirs."""
    trained = Trained(outputs=logits, model=model)
    trainer.add_callback(watch(trained))
    trainer.train()
    return trained


def transformers_trainer(root: Path, model: Any = None, **more: object) -> Trained:
    from transformers import Trainer, TrainingArguments, default_data_collator

    examples = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    arguments = TrainingArguments(output_dir=str(root), **ARGUMENTS, **more)
    model = model or llama()
    trainer = Trainer(
        model=copy.deepcopy(model),
        args=arguments,
        train_dataset=examples,
        data_collator=default_data_collator,
        processing_class=tokenizer(),
    )
    return run_trainer(model, trainer)


def saved(
    make: Callable[[Path], Any], save: Callable[[Any, Path], object], outputs: Any = logits, *, by: float = 0.1
) -> Any:
    """A run of what has a saver, and no trainer here."""

    def build(root: Path) -> Trained:
        trained = Trained(outputs=outputs, model=make(root))
        for step in STEPS:
            drift(trained.model, step, by=by)
            here = root / f"checkpoint-{step}"
            save(trained.model, here)
            trained.keep(here)
        return trained

    return build


def in_shards(model: Any, here: Path) -> None:
    model.save_pretrained(here, max_shard_size="8KB")
    tokenizer().save_pretrained(here)


def base(root: Path, head: str = "CausalLM", **more: object) -> Any:
    """The model that an adapter is trained on, loaded from where it lies."""
    import transformers

    place = root.parent / "base"
    llama(head, **more).save_pretrained(place)
    return getattr(transformers, f"LlamaFor{head}").from_pretrained(place)


def lora(**more: Any) -> Any:
    import peft

    return peft.LoraConfig(
        **{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | more
    )


def adapted(config: Callable[[], Any], head: str = "CausalLM") -> Callable[[Path], Any]:
    import peft

    def make(root: Path) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(base(root, head, num_labels=2), config())

    return make


def trainer_lora(root: Path) -> Trained:
    return transformers_trainer(root, adapted(lora)(root))


def save_adapter(model: Any, here: Path) -> None:
    model.save_pretrained(here)


def prompt_tuning() -> Any:
    import peft

    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def modules_to_save() -> Any:
    return lora(task_type="SEQ_CLS", modules_to_save=["score"])


def tokens_trained() -> Any:
    return lora(trainable_token_indices=[3, 4], modules_to_save=["lm_head"])


def trl(
    kind: str,
    rows: list[dict[str, Any]],
    head: str = "CausalLM",
    *,
    adapt: bool = False,
    given: Any = None,
    **more: Any,
) -> Any:
    """A run of one of TRL's trainers."""

    def build(root: Path) -> Trained:
        import peft
        import trl
        from datasets import Dataset

        model = base(root, head, num_labels=1)
        arguments = getattr(trl, f"{kind}Config")(output_dir=str(root), bf16=False, **ARGUMENTS | more)
        further = (given or {}) | ({"peft_config": lora()} if adapt else {})
        trainer = getattr(trl, f"{kind}Trainer")
        made = trainer(
            model=copy.deepcopy(model),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            **further,
        )
        return run_trainer(peft.get_peft_model(model, lora()) if adapt else model, made)

    return build


def rewards(completions: list[str], **_: object) -> list[float]:
    return [float(len(each) % 3) for each in completions]


PROMPTS = [{"prompt": text} for text in TEXTS]
KTO = [{"prompt": text, "completion": " a b", "label": place % 2 == 0} for place, text in enumerate(TEXTS)]
PREFERENCES = [{"prompt": "a b c", "chosen": f" {text}", "rejected": " u t s r"} for text in TEXTS]

BUILDERS = {
    "Trainer of transformers": transformers_trainer,
    "the same, in shards": saved(lambda root: llama(), in_shards),
    "Trainer with PEFT": trainer_lora,
    "PEFT, `modules_to_save`": saved(
        lambda root: adapted(modules_to_save, "SequenceClassification")(root), save_adapter
    ),
    "PEFT, prompt tuning": saved(lambda root: adapted(prompt_tuning)(root), save_adapter),
    "TRL, SFT": trl("SFT", [{"text": text} for text in TEXTS], max_length=8),
    "TRL, SFT with LoRA": trl("SFT", [{"text": text} for text in TEXTS], max_length=8, adapt=True),
    "TRL, DPO with LoRA": trl("DPO", PREFERENCES, max_length=12, adapt=True),
    "TRL, GRPO": trl("GRPO", PROMPTS, num_generations=2, max_completion_length=4, given={"reward_funcs": rewards}),
    "TRL, RLOO": trl("RLOO", PROMPTS, num_generations=2, max_completion_length=4, given={"reward_funcs": rewards}),
    "TRL, KTO": trl("KTO", KTO, max_length=12),
    "TRL, DPO": trl("DPO", PREFERENCES, max_length=12),
    "TRL, reward model": trl("Reward", PREFERENCES, "SequenceClassification", max_length=12),
}
