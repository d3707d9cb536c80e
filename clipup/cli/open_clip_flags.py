"""Options of open_clip_train, up to its version 4, that ``clipup train`` does not have: the nearest of ours, or why.

Both trainers name what they share alike, so a command line that was written for open_clip_train works here up to the
options of this table, and those are refused with what to do instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

_AUDIO = "clipup trains towers of images and texts, not of audio"
_NAFLEX = "clipup trains on images of one size"
_REMOTE = "copy the directory of the run by another program, such as rclone copy logs/NAME REMOTE:PATH"
_BUCKETS = "on a CPU the text towers stop at the longest text of a batch; elsewhere sparse layers skip the padding"

INSTEAD = {
    "--val-num-samples": "the samples are counted while they are read",
    "--image-key": "an image is the member of a sample that has an image's extension",
    "--text-key": "a caption is the member of a sample with the extension txt, caption or text",
    "--json-text-key": "captions of a json are read from its captions or caption",
    "--json-text-key-probs": "write the captions as .txt members",
    "--cache-dir": "set the environment variable HF_HOME, which all downloads follow",
    "--pretrained-image": "start from a whole CLIP with --pretrained",
    "--log-local": "rank 0 writes the log",
    "--log-metric-every-n-steps": "use --log-every-n-steps",
    "--train-loss-ema-samples": "metrics.jsonl has the loss of every logged step, to be smoothed as you like",
    "--debug": "set the environment variable CLIPUP_DEBUG=1 for tracebacks",
    "--copy-codebase": "every checkpoint holds the options, and the version of an installed package is known",
    **dict.fromkeys(("--remote-sync", "--remote-sync-frequency", "--remote-sync-protocol"), _REMOTE),
    "--use-bn-sync": "each rank keeps the batch norm statistics of its own images",
    "--val-retrieval-chunk-size": "retrieval is always computed in parts",
    "--val-retrieval-precision": "retrieval is computed in float32; the encoders run in --precision",
    "--dist-url": "start with torchrun, which sets MASTER_ADDR and MASTER_PORT",
    "--no-set-device-rank": "set CUDA_VISIBLE_DEVICES so that each process sees the GPU of its LOCAL_RANK",
    "--ddp-static-graph": "DistributedDataParallel runs with its usual graph",
    "--horovod": "start with torchrun",
    "--loss-dist-impl": "SigLIP's loss exchanges texts with the neighbouring ranks; --local-loss and "
    "--gather-with-grad are for the softmax loss",
    "--use-bnb-linear": "there are no 8-bit layers; --precision bf16 halves the memory of the weights",
    "--torchscript": "sparse layers cannot be scripted",
    "--trace": "sparse layers cannot be traced",
    "--text-pooler-own-group": "the pooler of a Hugging Face tower belongs to the group of its projection",
    "--opt-fallback-list": "an optimizer with a fallback selects the parameters for it by their shapes",
    "--visual-layer-decay": "use --image-layer-decay",
    "--torchcompile-strategy": "the model is compiled, as by its strategy model; leave it out",
    "--use-naflex": _NAFLEX,
    "--force-naflex-vision": _NAFLEX,
    **dict.fromkeys(
        (
            *("--naflex-num-train-image-tokens", "--naflex-patch-sizes", "--naflex-patch-size-probs"),
            *("--naflex-seq-lens", "--naflex-seq-len-probs", "--naflex-max-tokens-per-batch"),
            *("--naflex-max-text-tokens", "--naflex-batch-divisor", "--naflex-loss-scale", "--naflex-pad-multiple"),
        ),
        _NAFLEX,
    ),
    **dict.fromkeys(
        ("--length-bucketing", "--bucket-pool", "--bucket-chunk", "--bucket-prefetch-pools", "--text-pad-multiple"),
        _BUCKETS,
    ),
    **dict.fromkeys(
        (
            *("--audio-ext", "--pretrained-audio", "--audio-fill", "--audio-trunc", "--audio-fusion"),
            *("--audio-int16-normalize", "--audio-zeroshot-dataset", "--audio-zeroshot-split"),
            *("--audio-zeroshot-audio-key", "--audio-zeroshot-target-key", "--audio-zeroshot-class-key"),
            *("--audio-zeroshot-template", "--audio-zeroshot-workers", "--audio-zeroshot-multiprocessing-context"),
            *("--audio-multiprocessing-context", "--audio-layer-decay"),
        ),
        _AUDIO,
    ),
}


def refuse(argv: Sequence[str], known: Collection[str]) -> None:
    """
    Args:
        known: the flags of clipup, with dashes.

    Raises:
        ValueError: a flag is open_clip_train's and not among the known ones.
    """
    for argument in argv:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in INSTEAD and flag not in known:
            raise ValueError(
                f"{argument.partition('=')[0]} is an option of open_clip_train that clipup does not have: "
                f"{INSTEAD[flag]}"
            )
