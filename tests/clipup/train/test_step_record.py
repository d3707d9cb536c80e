"""The routing metrics in the record of a logged step."""

import pytest
import torch

import clipup.train
from clipup import SparseMoE, moe_metrics
from clipup.train import train
from clipup.train.log.step_record import routing_of, step_record
from clipup.train.ranks.distributed import Ranks

RANKS = Ranks(torch.device("cpu"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([SparseMoE(12, 16, num_experts=4) for _ in range(2)])
    for layer in layers:
        layer(torch.randn(20, 12))
    return layers


def test_the_record_holds_every_metric_of_every_layer_and_the_means_of_the_scalars(model):
    found = {
        name: {**values, "rank": values["z"] + 1, "share": values["load"]} for name, values in routing_of(model).items()
    }
    record = step_record({"loss": torch.tensor(2.0)}, found, RANKS)

    layers = record.pop("layers")
    for name, values in found.items():
        assert layers[name] == {key: pytest.approx(tensor.tolist()) for key, tensor in values.items()}
    scalars = [key for key, value in layers["0"].items() if isinstance(value, float)]
    assert {"balance", "z", "dropped", "router_entropy", "rank"} <= set(scalars)
    means = {key: pytest.approx(sum(values[key] for values in layers.values()) / 2) for key in scalars}
    assert record == {"loss": 2.0, **means}


def test_a_dense_models_record_holds_the_scalars_alone():
    assert step_record({"loss": torch.tensor(2.0)}, routing_of(torch.nn.Linear(2, 2)), RANKS) == {"loss": 2.0}


def test_an_accumulated_steps_record_holds_the_means_over_its_batches(make_model, pairs, options):
    def layers(batch_size, accum_freq):
        data = pairs(pairs=16, noise=0, batch_size=batch_size)
        config = clipup.MoEConfig(num_experts=4, towers=("image",))
        settings = options(logs=None, steps=1, accum_freq=accum_freq)
        (record,) = train(settings, model=make_model(config), loader=data).history
        return record["layers"]

    for name, values in layers(16, 1).items():
        assert layers(8, 2)[name]["load"] == pytest.approx(values["load"], abs=1e-6)


def test_every_metric_in_the_record_is_documented(model):
    for values in moe_metrics(model).values():
        for name in values:
            assert f"``{name}``" in moe_metrics.__doc__
            assert name == "expert_indices" or f"``{name}``" in clipup.train.__doc__
