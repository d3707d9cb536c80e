import sparse_transformer as example
import torch

from clipup import aux_loss, moe_layers, moe_metrics


def test_loss_falls_and_every_loss_is_taken(capsys):
    model, history = example.train(steps=40, batch_size=16)
    assert sum(history[-10:]) / 10 < 0.8 * history[0]
    assert len(moe_layers(model)) == 2 and aux_loss(model) == 0
    example.main(["--steps", "2"])
    assert "digits right on fresh sequences" in capsys.readouterr().out


def test_padding_takes_no_part_in_routing():
    model = example.SortingTransformer()
    sequences, _ = example.make_batch(8, torch.Generator().manual_seed(0))
    model(sequences)
    for metrics in moe_metrics(model).values():
        assert torch.equal(metrics["expert_indices"][:, 0] == -1, (sequences == example.PADDING).flatten())
