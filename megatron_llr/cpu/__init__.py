"""Where a job runs: the choice between CUDA and CPU, and the CPU substitutions."""
