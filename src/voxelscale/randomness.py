"""Random numbers as a pure function of what they are for.

Counter-based (Philox; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): any
process can draw the numbers of any sample without drawing those before it.
"""

from __future__ import annotations

import numpy as np


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random numbers of one stream of one sample; what is drawn in one never shifts another."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream]))
