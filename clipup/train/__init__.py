"""Training: ``train(TrainOptions(...))``, the program ``clipup train``.

    from clipup.train import Every, TrainOptions, train
    result = train(TrainOptions(logs=None, steps=200, warmup=20, lr=1e-3), model=model, loader=loader)

A line of metrics.jsonl, and a record of ``result.history``: ``step``, ``epoch``, ``lr``, ``loss`` (= ``contrastive`` +
``aux``), ``logit_scale`` (the factor), ``images_per_second``, ``seconds`` (in training); for a sparse model also
``balance``, ``z``, ``dropped``, ``router_entropy`` as means over layers, and under ``layers`` each of them for every
layer with its ``load`` (a share an expert). With accumulation the routing is that of the last batch of a step.
"""

from .loop import Every, NonFiniteLoss, Trainer, TrainingInterrupted, TrainResult, train
from .options import TrainOptions

__all__ = ["Every", "NonFiniteLoss", "TrainOptions", "TrainResult", "Trainer", "TrainingInterrupted", "train"]
