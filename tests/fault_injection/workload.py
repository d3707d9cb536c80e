"""The training under test: a tiny sparse CLIP on a tiny data set, by ``clipup train``."""

import random
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import open_clip  # noqa: E402
import torch  # noqa: E402
from sparse_clip import pictures  # noqa: E402
from tiny_clip import tiny_config  # noqa: E402

import clipup  # noqa: E402

WORDS = "arrow circle right square left tone off up down text add file person light check folder chart list".split()
TEXT = {"hf_tokenizer_name": "words:icons", "vocab_size": 6139, "layers": 2}

PAIRS, GLOBAL_BATCH, EPOCHS = 96, 8, 5
STEPS = EPOCHS * PAIRS // GLOBAL_BATCH
SAVE_EVERY = 5
"""Steps between two checkpoints. It does not divide an epoch."""

LONGEST = 300
"""Seconds after which a start that has not ended hangs, also on a busy machine."""

RANK_TIMEOUT = 25
"""Seconds that ranks wait for a frozen one."""


class Workload(NamedTuple):
    """The files below ``root`` that every run reads, and the command that starts a run."""

    root: Path
    processes: int
    sharded: bool = False
    """Whether two processes divide the model, with FSDP and expert parallelism, and write sharded checkpoints."""

    @property
    def most_lost(self) -> int:
        """The most steps that a killed run repeats. A sharded checkpoint is written while training goes on, at most
        until the next one is due."""
        return 2 * SAVE_EVERY if self.sharded else SAVE_EVERY

    def make(self) -> None:
        """Writes the data set and the dense model that runs start from."""
        drawn = random.Random(0)
        for split, count in (("train", PAIRS), ("val", 16)):
            rows = ["filepath\ttitle"]
            for number, picture in enumerate(pictures(count, seed=len(split))):
                path = self.root / f"{split}-{number}.png"
                picture.save(path)
                rows.append(f"{path}\t{' '.join(drawn.sample(WORDS, 4))}")
            (self.root / f"{split}.csv").write_text("\n".join(rows) + "\n")
        config = tiny_config()
        config["text_cfg"] |= TEXT
        config["vision_cfg"]["layers"] = 2
        torch.manual_seed(0)
        clipup.save_pretrained(open_clip.CLIP(**config), self.root / "dense", config)

    def command(self, run: Path, *more: str) -> list[str]:
        """The arguments of ``clipup`` for a run. Router noise makes it depend on every random number."""
        options = {
            "model": self.root / "dense",
            "train-data": self.root / "train.csv",
            "val-data": self.root / "val.csv",
            "logs": run.parent,
            "name": run.name,
            "device": "cpu",
            "workers": 1,
            "batch-size": GLOBAL_BATCH // self.processes,
            "epochs": EPOCHS,
            "lr": 1e-3,
            "warmup": 5,
            "save-every-n-steps": SAVE_EVERY,
            "num-experts": 4,
            "router-noise": 1.0,
            "selection-bias": "sign",
        }
        options |= {"dist-timeout": RANK_TIMEOUT} if self.processes > 1 else {}
        options |= {"fsdp-checkpoint": "sharded", "ep": 2} if self.sharded else {}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return ["train", *words, "--moe", *["--fsdp"] * self.sharded, *more]
