"""The public names of ``clipup`` and their modules. Type checkers read this file, and so does ``__init__.py``."""

from clipup_kernels import __version__ as __version__

from . import evaluate as evaluate
from . import inspection as inspection
from . import models as models
from . import moe as moe
from . import plan as plan
from . import search as search
from . import train as train
from .inference.accelerate import accelerate as accelerate
from .inference.report import accelerate_report as accelerate_report
from .models.factory import create_model_and_transforms as create_model_and_transforms
from .models.factory import load_checkpoint as load_checkpoint
from .models.model_names import get_model_config as get_model_config
from .models.saving import save_pretrained as save_pretrained
from .models.timm_factory import create_timm_model as create_timm_model
from .models.tokenizers import get_tokenizer as get_tokenizer
from .moe.config import MoEConfig as MoEConfig
from .moe.layer import SparseMoE as SparseMoE
from .moe.layer import aux_loss as aux_loss
from .moe.layer import collect_aux_losses as collect_aux_losses
from .moe.layer import moe_layers as moe_layers
from .moe.metrics import moe_metrics as moe_metrics
from .moe.selection_bias import update_selection_bias as update_selection_bias
from .moe.weight_decay import parameter_groups as parameter_groups
from .upcycling.calibration import calibrate as calibrate
from .upcycling.clusters import initialize_by_clusters as initialize_by_clusters
from .upcycling.step0 import step0_difference as step0_difference
from .upcycling.upcycle import upcycle as upcycle
