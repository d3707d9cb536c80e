import pytest

LAYERS = ("visual.transformer.resblocks.1.mlp", "visual.transformer.resblocks.3.mlp", "transformer.resblocks.1.mlp")


def recall(way, r1):
    return {f"{way}_R@1": r1, f"{way}_R@5": 1.9 * r1, f"{way}_R@10": 2.4 * r1}


def arm(to_image, to_text, steps, seconds, params, active, gflops):
    def measured(share, gallery):
        found = recall("text_to_image", share * to_image) | recall("image_to_text", share * to_text)
        return {**found, "chance_R@1": 1 / gallery, "gallery": gallery, "captions": 3 * gallery}

    costs = {"steps": steps, "seconds": seconds, "params": params, "active_params": active, "gflops_per_pair": gflops}
    return {**costs, **measured(1, 1012), "splits": {"emoji": measured(1.2, 402), "concepts": measured(0.6, 894)}}


@pytest.fixture
def make_report():
    return report


def report(to_image=0.2433, to_text=0.2461):
    """What report.json holds; the dense baseline (continued training) has 0.231 and 0.239."""
    return {
        "data": {"name": "pictograms", "train_pairs": 11873, "test_images": 1012, "test_captions": 3988},
        "chance_R@1": 1 / 1012,
        "dense": arm(0.178, 0.185, 0, 0.0, 843_521, 843_521, 0.01234),
        "upcycled_step0": {
            **arm(0.178, 0.185, 0, 0.0, 1_772_033, 1_013_345, 0.01633),
            "max_feature_difference": 2.98e-7,
        },
        "dense_continued": arm(0.231, 0.239, 400, 58.4, 843_521, 843_521, 0.01234),
        "clip_up": arm(to_image, to_text, 400, 78.0, 1_772_033, 1_013_345, 0.01633),
        "options": {"seed": 0},
        "moe_cfg": {"num_experts": 8, "blocks": {"image": [1, 3]}},
        "machine": {"processor": "Abacus-7", "threads": 2},
    }
