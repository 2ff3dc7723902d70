"""CLEX: frequencies that flow with the length of the text, by a learned differential equation.
(Chen et al. 2023, arXiv 2310.16450)"""
import math

import torch
from torch import Tensor

from rope import ntk


def clex(head_dim: int, base: float, factor: float, original_window: int, seq_len: int,
         max_factor: float = 16.0) -> tuple[Tensor, float]:
    """Untrained CLEX: NTK-aware with 2t - 1 in the place of s, t = ceil(l/L). That is `dynamic`
    with factor 2 in steps of L. The trained part is the class CLEX."""
    t = clex_time(original_window, seq_len, max_factor)
    return ntk(head_dim, base, 2 * t - 1)


def clex_time(original_window: int, seq_len: int, max_factor: float) -> float:
    """t = ceil(l/L), from 1 to max_factor: whole, as in training."""
    return min(max(1.0, math.ceil(seq_len / original_window)), max_factor)


class CLEX(torch.nn.Module):
    """The learned part: y(t), the log-frequencies z(t) less those of NTK, with y(1) = 0 and

        dy/dt = W_down tanh(W_up (z + ln theta_NTK(t))),
        theta_NTK(t) = NTK-aware with 2t - 1 in the place of s.

    That is the paper's dz/dt = network + d ln theta_NTK/dt with the second term integrated exactly.
    W_down begins at zero, so that an untrained CLEX is NTK.
    """

    def __init__(self, pairs: int):
        super().__init__()
        self.up = torch.nn.Linear(pairs, pairs, bias=False)
        self.down = torch.nn.Linear(pairs, pairs, bias=False)
        torch.nn.init.zeros_(self.down.weight)

    def forward(self, theta: Tensor, t: float, steps_per_unit: int = 8) -> Tensor:
        """exp y(t) = theta_i(t) / theta_NTK,i(t): the unscaled theta [D/2] -> float32 [D/2].

        Runge and Kutta's method of order 4. The paper takes 100 steps for each unit of t; with 8
        the frequencies differ by less than 1e-5.
        """
        theta = theta.float().to(self.up.weight.device)
        n_steps = math.ceil((t - 1) * steps_per_unit)
        h = (t - 1) / max(n_steps, 1)
        y = torch.zeros_like(theta)
        with torch.autocast(theta.device.type, enabled=False):
            for n in range(n_steps):
                now = 1 + n * h
                k1 = self.slope(theta, now, y)
                k2 = self.slope(theta, now + h / 2, y + h / 2 * k1)
                k3 = self.slope(theta, now + h / 2, y + h / 2 * k2)
                k4 = self.slope(theta, now + h, y + h * k3)
                y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return y.exp()

    def slope(self, theta: Tensor, t: float, y: Tensor) -> Tensor:
        """dy/dt, in float32 in a bfloat16 model, too. z = y + ln theta_NTK."""
        pairs = len(theta)
        i = torch.arange(pairs, dtype=theta.dtype, device=theta.device)
        log_ntk = (theta * (2 * t - 1) ** (-2 * i / max(2 * pairs - 2, 1))).log()
        hidden = torch.tanh(self.up.weight.float() @ (y + 2 * log_ntk))
        return self.down.weight.float() @ hidden
