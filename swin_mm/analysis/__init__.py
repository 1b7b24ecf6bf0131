"""Analysis of data, models and runs: prediction, dataset checks, attention maps, complexity, curves, export."""
