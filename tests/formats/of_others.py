"""What accelerate saves, sentence-transformers, and trainers whose layout is all their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests import trainers
from tests.formats.of_language import ARGUMENTS, run_trainer
from tests.formats.trained import TINY, Build, Trained, drift, tokenizer
from tests.trainers import STEPS, note

SAVES = (0, 1, 2)


def accelerate_state(root: Path) -> Trained:
    """A generator and a discriminator, an optimizer, a scheduler, and an object of one's own."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    class Counter:
        def state_dict(self) -> dict[str, int]:
            return {"seen": 3}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise NotImplementedError

    accelerator = Accelerator(
        cpu=True, project_config=ProjectConfiguration(str(root.parent), automatic_checkpoint_naming=True)
    )
    torch.manual_seed(0)
    models = nn.Linear(4, 3), nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(models[0].parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    accelerator.prepare(*models, optimizer, schedule)
    accelerator.register_for_checkpointing(Counter())
    trained = Trained()
    for save in SAVES:
        for model in models:
            drift(model, save)
        trained.checkpoints.append(Path(accelerator.save_state()))
    return trained


TEXTS = [("a b c", "a b d"), ("c d e", "c e f"), ("k l m", "k l n"), ("q r s", "q r t")]


def bert(root: Path, kind: str, **more: object) -> str:
    import transformers

    torch.manual_seed(0)
    sizes = {name: value for name, value in TINY.items() if name != "num_key_value_heads"}
    getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**sizes, **more)).save_pretrained(root.parent / "base")
    tokenizer().save_pretrained(root.parent / "base")
    return str(root.parent / "base")


def embedded(model: Any) -> Tensor:
    model.eval()
    found: Tensor = model(model.preprocess(["a b c", "k l m"]))["sentence_embedding"]
    return found


def train(root: Path, model: Any, loss: Any, columns: tuple[str, ...], outputs: Any, **extra: Any) -> Trained:
    """By the trainer of its kind."""
    import sentence_transformers as st
    from datasets import Dataset

    kind = type(model).__name__
    rows = [dict(zip(columns, (*pair, float(place % 2)), strict=False)) for place, pair in enumerate(TEXTS)]
    arguments = getattr(st, f"{kind}TrainingArguments")(output_dir=str(root), **ARGUMENTS)
    like = copy.deepcopy(model)
    trainer = getattr(st, f"{kind}Trainer")(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=loss(model)
    )
    trained = run_trainer(like, trainer)
    trained.outputs = outputs
    return trained


def sentence_transformer(root: Path) -> Trained:
    import sentence_transformers as st
    from sentence_transformers import models
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    words = models.Transformer(bert(root, "Model"))
    modules = [words, models.Pooling(16), models.Dense(16, 8), models.Normalize()]
    return train(
        root, st.SentenceTransformer(modules=modules), MultipleNegativesRankingLoss, ("anchor", "positive"), embedded
    )


def setfit(root: Path) -> Trained:
    """The body, as SetFit has sentence-transformers save it, and a head that scikit-learn fits."""
    import sentence_transformers as st

    trained = Trained(outputs=embedded, model=st.SentenceTransformer(bert(root, "Model")))
    for step in STEPS:
        drift(trained.model, step)
        here = root / f"step_{step}"
        trained.model.save_pretrained(str(here))
        note(here / "config_setfit.json", {"labels": None, "normalize_embeddings": False})
        note(here / "model_head.pkl", "a pickle")
        trained.keep(here)
    return trained


def sparse_encoder(root: Path) -> Trained:
    import sentence_transformers as st
    from sentence_transformers.sparse_encoder import losses, models

    modules = [models.MLMTransformer(bert(root, "ForMaskedLM")), models.SpladePooling(pooling_strategy="max")]

    def loss(model: Any) -> Any:
        return losses.SpladeLoss(model, losses.SparseMultipleNegativesRankingLoss(model), 1e-3)

    return train(root, st.SparseEncoder(modules=modules), loss, ("anchor", "positive"), embedded)


def scored(model: Any) -> Tensor:
    model.eval()
    tokens = tokenizer()([["a b c", "k l m"]], return_tensors="pt", padding=True)
    found: Tensor = getattr(model, "model", model)(**tokens).logits
    return found


def cross_encoder(root: Path) -> Trained:
    import sentence_transformers as st
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    model = st.CrossEncoder(bert(root, "ForSequenceClassification", num_labels=1), max_length=16)
    return train(root, model, BinaryCrossEntropyLoss, ("a", "b", "label"), scored)


def lerobot(root: Path) -> Trained:
    trainers.lerobot(root)
    return Trained([root / f"{step:06d}" for step in STEPS])


BUILDERS: dict[str, Build] = {
    "accelerate, `save_state`": accelerate_state,
    "sentence-transformers, with a Dense module": sentence_transformer,
    "sentence-transformers, SparseEncoder": sparse_encoder,
    "sentence-transformers, CrossEncoder": cross_encoder,
    "SetFit": setfit,
    "lerobot": lerobot,
}
