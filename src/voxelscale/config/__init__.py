"""The config: every parameter of a run; a section a file, its rules beside its keys."""

from voxelscale.config.augment import AugmentConfig
from voxelscale.config.data import DataConfig
from voxelscale.config.loss import LossConfig
from voxelscale.config.model import ModelConfig
from voxelscale.config.optim import OptimConfig
from voxelscale.config.phantom import PhantomConfig
from voxelscale.config.predict import PredictConfig
from voxelscale.config.prepare import PrepareConfig
from voxelscale.config.reading import ReadingConfig
from voxelscale.config.refine import RefineConfig
from voxelscale.config.scale import ScaleConfig
from voxelscale.config.search import SearchConfig
from voxelscale.config.section import IntTriple, Triple
from voxelscale.config.train import TrainConfig
from voxelscale.config.tree import Config, dump, from_dict, from_stored, keys, load, load_stored, to_dict

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "IntTriple",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PhantomConfig",
    "PredictConfig",
    "PrepareConfig",
    "ReadingConfig",
    "RefineConfig",
    "ScaleConfig",
    "SearchConfig",
    "TrainConfig",
    "Triple",
    "dump",
    "from_dict",
    "from_stored",
    "keys",
    "load",
    "load_stored",
    "to_dict",
]
