"""Emulation of CUDA and of GPU-only layers, for Megatron's training loop on CPUs."""
