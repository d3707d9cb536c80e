"""One Mixture-of-Experts layer, forward and backward: this project's ops against dense MLPs and plain torch.

    python benchmarks/moe_training.py                                 # tables, in some ten minutes
    python benchmarks/moe_training.py --shapes 6304x768x3072 --dtype bf16 --csv benchmarks/results/training.csv
    python benchmarks/moe_training.py --suite full --csv benchmarks/results/moe_training_cpu.csv

Outputs and gradients of every implementation are checked against a float64 oracle before anything is timed.
"""

from moe_bench import main

if __name__ == "__main__":
    raise SystemExit(main(__doc__, training=True))
