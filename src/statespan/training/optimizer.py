"""AdamW over two groups of parameters: with weight decay and without."""

from torch import nn
from torch.optim import AdamW

from statespan.training.config import OptimizerConfig

SSM_PARAMETERS = frozenset({"A_log", "D", "dt_bias", "log_dt", "log_A_real", "A_imag", "P", "B"})


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay shrinks the parameter called `name`.

    It shrinks matrices, conv taps and S4's C. It leaves alone A_log, D and the dt biases, and A, B and dt of S4 (decay
    would pull the memory's time scales to one value, arXiv 2312.00752), biases, norms and every other vector, and the
    embedding, tied to the head or not: a rare token's row gets few gradients to make up for the decay.
    """
    leaf = name.rpartition(".")[2]
    return not (parameter.ndim < 2 or leaf in SSM_PARAMETERS or leaf.endswith("bias") or name.startswith("embedding."))


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW for `model`, in PyTorch's fused form (on the CPU 2 to 6 times as fast as the others)."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if has_weight_decay(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trained if not has_weight_decay(name, p)], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: AdamW, learning_rate: float) -> None:
    """Use `learning_rate` for the next update of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
