from dataclasses import dataclass
from voxelscale.train.memory import estimate_memory
import torch
@dataclass(frozen=True, kw_only=True)
class Cost:
    memory: int
    flop: float
    parameters: int
def cost_of(config, spacing, device):
    return Cost(memory=estimate_memory(config, spacing, torch.device(device)), flop=1.0, parameters=1)
def constraints(config, spacing, device, available):
    return {"memory": cost_of(config,spacing,device).memory/available-1, "pooling": 0.0}
