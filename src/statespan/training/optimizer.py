"""AdamW over groups of parameters: with weight decay or without, and A, B and dt of S4 at a rate of their own."""

from torch import Tensor, nn
from torch.optim import AdamW

from statespan.training.config import OptimizerConfig

LTI_DYNAMICS = frozenset({"log_dt", "log_A_real", "A_imag", "P", "B"})  # of S4, S4D and LSSL
UNDECAYED = LTI_DYNAMICS | {"A_log", "D", "dt_bias"}


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay shrinks the parameter called `name`.

    It shrinks matrices, conv taps and S4's C. It leaves alone A_log, D and the dt biases, and A, B and dt of S4 (decay
    would pull the memory's time scales to one value, arXiv 2312.00752), biases, norms and every other vector, and the
    embeddings of tokens, tied to the head or not, and positions: a rare one's row gets few gradients to make up for the
    decay.
    """
    path = name.split(".")
    embedding = "embedding" in path or "position_embedding" in path
    return not (parameter.ndim < 2 or path[-1] in UNDECAYED or path[-1].endswith("bias") or embedding)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW for `model`, in PyTorch's fused form (on the CPU 2 to 6 times as fast as the others).

    A group's learning rate is "lr_ratio" times what `set_learning_rate` is given.
    """
    dynamics_ratio = 1.0 if config.lti_learning_rate is None else config.lti_learning_rate / config.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by weight decay and ratio
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if has_weight_decay(name, parameter) else 0.0
            ratio = dynamics_ratio if name.rpartition(".")[2] in LTI_DYNAMICS else 1.0
            groups.setdefault((decay, ratio), []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": ratio * config.learning_rate, "lr_ratio": ratio}
            for (decay, ratio), parameters in groups.items()
        ],
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: AdamW, learning_rate: float | Tensor) -> None:
    """Use `learning_rate` for the next update, each group its share of it; a group whose rate is a tensor keeps it."""
    for group in optimizer.param_groups:
        rate = group["lr_ratio"] * learning_rate
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(rate)
        else:
            group["lr"] = rate
