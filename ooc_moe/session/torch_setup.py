"""Sets what torch keeps for the whole process: threads, the current GPU, and how exact and how repeatable its arithmetic is."""

from __future__ import annotations

import os

import torch

from ooc_moe.config.run import RunConfig

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def set_up_torch(config: RunConfig) -> None:
    """Sets torch up for a run. Training, evaluation and `load` all begin with it, so none of these settings is left to chance.

    - Threads are those of the configuration.
    - Float32 is float32: TF32 is off in matrix products and in convolutions. torch would use TF32, which rounds inputs to 10 bits of
      mantissa, in convolutions on a GPU. The fast way is `compute="bfloat16"`.
    - cuDNN does not try out convolution algorithms: which one wins depends on the clock, and so would the results.
    - With `deterministic`, torch refuses operations that may give other bits when they are repeated, and cuBLAS gets the workspace that
      it needs for the same bits. cuBLAS reads the variable CUBLAS_WORKSPACE_CONFIG once, when the process first uses cuBLAS; a value that
      is set already is kept.
    - The run's GPU becomes the current one of this thread, so that nothing opens a context on GPU 0 beside it.
    """
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = config.deterministic
    if config.deterministic:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    # By default torch fills every new tensor with NaN as well, to expose reads of memory that was never written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = torch.device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
