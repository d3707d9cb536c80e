"""One Mixture-of-Experts layer, inference: this project's ops against dense MLPs and plain torch.

    python benchmarks/moe_forward.py                                  # tables, in a minute
    python benchmarks/moe_forward.py --shapes 6304x768x3072 --dtype fp32 --csv benchmarks/results/forward.csv
    python benchmarks/moe_forward.py --suite full --csv benchmarks/results/moe_forward_cpu.csv

Every implementation is checked against a float64 oracle before anything is timed.
"""

from moe_bench import main

if __name__ == "__main__":
    raise SystemExit(main(__doc__, training=False))
