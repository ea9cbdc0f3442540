"""What is trained: one module a family, all of the shape of `gym.training.Family`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gym.families import actor_critic, cnn, ddp, gan, gpt, lstm, mlp

if TYPE_CHECKING:
    from gym.training import Family

FAMILIES: Final[dict[str, Family]] = {each.NAME: each for each in (mlp, cnn, gpt, lstm, gan, actor_critic, ddp)}
