"""The papers' ablation tables, repeated at small scale with the edge models: ``python -m benchmarks.ablations``."""
