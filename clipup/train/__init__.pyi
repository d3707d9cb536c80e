"""The public names of ``clipup.train`` and their modules. Type checkers read this file, and so does ``__init__.py``."""

from .finite import NonFiniteGradients as NonFiniteGradients
from .finite import NonFiniteWeights as NonFiniteWeights
from .loop import Trainer as Trainer
from .result import Every as Every
from .result import TrainingInterrupted as TrainingInterrupted
from .result import TrainResult as TrainResult
from .run import train as train
from .train_options import TrainOptions as TrainOptions
