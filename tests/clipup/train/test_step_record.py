"""The routing metrics in the record of a logged step."""

import pytest
import torch

import clipup.train
from clipup import SparseMoE, moe_metrics
from clipup.train import train
from clipup.train.ranks.distributed import Ranks
from clipup.train.step import StepLosses


@pytest.fixture
def metrics():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([SparseMoE(12, 16, num_experts=4) for _ in range(2)])
    for layer in layers:
        layer(torch.randn(20, 12))
    return moe_metrics(layers)


def test_the_record_holds_every_metric_of_every_layer_and_the_means_of_the_scalars(metrics):
    metrics = {
        name: {key: value for key, value in values.items() if key != "expert_indices"}
        for name, values in metrics.items()
    }
    losses = StepLosses({"contrastive": torch.tensor(2.0)}, torch.tensor(1.0), torch.tensor(14.0), metrics)
    record = losses.record(Ranks(torch.device("cpu")), more=torch.tensor(5.0))

    layers = record.pop("layers")
    for name, values in metrics.items():
        assert layers[name] == {key: pytest.approx(tensor.tolist()) for key, tensor in values.items()}
    means = {
        key: pytest.approx(sum(values[key] for values in layers.values()) / 2)
        for key in ("balance", "z", "dropped", "router_entropy")
    }
    scalars = {"loss": 3.0, "contrastive": 2.0, "aux": 1.0, "logit_scale": 14.0, "more": 5.0}
    assert record == {**scalars, **means}


def test_an_accumulated_steps_record_holds_the_means_over_its_batches(make_model, pairs, options):
    def layers(batch_size, accum_freq):
        data = pairs(pairs=16, noise=0, batch_size=batch_size)
        config = clipup.MoEConfig(num_experts=4, towers=("image",))
        settings = options(logs=None, steps=1, accum_freq=accum_freq)
        (record,) = train(settings, model=make_model(config), loader=data).history
        return record["layers"]

    for name, values in layers(16, 1).items():
        assert layers(8, 2)[name]["load"] == pytest.approx(values["load"], abs=1e-6)


def test_every_metric_in_the_record_is_documented(metrics):
    for name in {name for values in metrics.values() for name in values}:
        assert f"``{name}``" in moe_metrics.__doc__
        assert name == "expert_indices" or f"``{name}``" in clipup.train.__doc__
