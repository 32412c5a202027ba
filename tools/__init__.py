"""The ctrfs command, benchmarks, set-up and demonstration scripts."""
