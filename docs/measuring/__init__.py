"""What docs/measure_kernels.py times, how, and the tables that it becomes."""
