"""Training: ``train(TrainOptions.flat(...))``, the program ``clipup train``.

    from clipup.train import Every, TrainOptions, train
    result = train(TrainOptions.flat(logs=None, steps=200, warmup=20, lr=1e-3), model=model, loader=loader)

A line of metrics.jsonl, and a record of ``result.history``: ``step``, ``epoch``, ``lr``, ``loss``, which is the sum of
``contrastive``, ``aux`` (the sparse layers' losses), ``distill`` with a teacher and ``caption`` for a CoCa;
``logit_scale`` (the factor); ``images_per_second`` of all ranks; ``batch_time``, ``data_time`` and ``step_time``, rank
0's mean seconds per step since the record before, those in which it waited for data and those in which it computed;
``mfu``, the share of a GPU's peak if that is known (``clipup.train.cards``); ``seconds`` (in training);
``skipped_steps`` (so far: steps whose gradient was not finite; they are not applied, and such a loss is None in the
record). For a sparse model also ``balance``, ``z``, ``dropped``, ``router_entropy`` as means over layers, and under
``layers`` each of them for every layer with its ``load`` (share per expert). With accumulation they are means over the
batches of a step.

A layer whose routing collapses is reported once, in ``result.warnings`` and warnings.jsonl
(``clipup.train.log.routing_collapse``).

A resumed run equals the run that was not stopped, bitwise on a CPU in float32. Within an epoch, data that are indexed
are continued where they were, others are read again from the epoch's start. One exception: worker processes that
stream WebDataset shards live for the whole run, so that from the second epoch on a resumed run has the same samples in
the same order, but other random crops.
"""

from ..extras import lazy_names

# Imported on first access: the options alone need no torch.
__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
