"""Pretrain a GPT or hybrid model on Megatron with a learning rate for every weight matrix.

Usage:
    torchrun --nproc-per-node 8 pretrain_gpt_llr.py <Megatron's flags> --llr-log-dir runs/llr

Every flag of Megatron's GPT training works as it does there; with --hybrid-layer-pattern the model
is Megatron's HybridModel, as in its hybrid training. `--llr-*` flags are listed at the end
of --help. With a GPU the job runs on CUDA and NCCL, without one on CPU and gloo.
"""

from megatron_llr.megatron.pretrain import main

if __name__ == "__main__":
    main()
