"""The running statistics of batch norms, which a skipped update must leave as they were."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """The running means and variances of a model in training, and what they were at the last update.

    A forward pass takes its batch into them at once. One batch with a value that is not a number would leave such a
    value in them for ever: training would go on, and every later evaluation find nothing.

    Args:
        model: In training mode; norms that are frozen or keep no statistics play no part.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.running_mean is not None]
        self._values: list[Tensor] = [v for m in norms for v in (m.running_mean, m.running_var) if v is not None]
        self._kept = torch.cat(self._values) if self._values else None

    @torch.no_grad()
    def settle(self, skipped: Tensor) -> None:
        """Keep what they are now; after a skipped update set them back. Waits for nothing.

        Args:
            skipped: float, on the device: 1 where the update was skipped, see `update_parameters`.
        """
        if self._kept is None:
            return
        self._kept = torch.where(skipped > 0, self._kept, torch.cat(self._values))
        torch._foreach_copy_(self._values, self._kept.split([len(value) for value in self._values]))
