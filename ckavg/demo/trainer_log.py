"""Stage ``demo``, the log: what transformers' Trainer would write to `trainer_state.json` of the same run.

It must not write files.
"""

import math

from ckavg.demo.checkpoint import RUN_NAME
from ckavg.demo.optimise import Update

__all__ = ["TrainerLog"]

_LOGGING_STEPS = 10


class TrainerLog:
    """The history of a run, an entry every ten optimizer steps: mean loss, gradient norm and learning rate.

    Args:
        steps: optimizer steps of the whole run.
        save_every: optimizer steps between two checkpoints.
        batch_size: windows a step.
        steps_per_epoch: optimizer steps in which as many bytes are read as the training text has.
    """

    def __init__(self, *, steps: int, save_every: int, batch_size: int, steps_per_epoch: float) -> None:
        self._steps, self._save_every, self._batch_size = steps, save_every, batch_size
        self._steps_per_epoch = steps_per_epoch
        self._history: list[dict[str, float]] = []
        self._unlogged_losses: list[float] = []

    def add(self, update: Update) -> None:
        """Take notice of one optimizer step."""
        self._unlogged_losses.append(update.loss)
        if update.step % _LOGGING_STEPS == 0:
            self._history.append(
                {
                    "epoch": self._epoch(update.step),
                    "grad_norm": update.gradient_norm,
                    "learning_rate": update.learning_rate,
                    "loss": sum(self._unlogged_losses) / len(self._unlogged_losses),
                    "step": update.step,
                }
            )
            self._unlogged_losses.clear()

    def state_at(self, step: int) -> dict[str, object]:
        """The contents of `trainer_state.json` in the checkpoint of `step`."""
        return {
            "best_global_step": None,
            "best_metric": None,
            "best_model_checkpoint": None,
            "epoch": self._epoch(step),
            "eval_steps": self._save_every,
            "global_step": step,
            "is_hyper_param_search": False,
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "log_history": list(self._history),
            "logging_steps": _LOGGING_STEPS,
            "max_steps": self._steps,
            "num_input_tokens_seen": 0,
            "num_train_epochs": math.ceil(self._steps / self._steps_per_epoch),
            "save_steps": self._save_every,
            "stateful_callbacks": {},
            "total_flos": 0,
            "train_batch_size": self._batch_size,
            "trial_name": RUN_NAME,
            "trial_params": None,
        }

    def _epoch(self, step: int) -> float:
        return step / self._steps_per_epoch
