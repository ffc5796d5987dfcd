from .fine_tuning import (
    fine_tune as fine_tune,
    finished as finished,
    parts_of as parts_of,
    request_of as request_of,
    result_of as result_of,
)
from .losses import (
    Loss as Loss,
    distillation as distillation,
    distillation_loss as distillation_loss,
    exit_label_loss as exit_label_loss,
    full_model_loss as full_model_loss,
    guided_shared_exit_loss as guided_shared_exit_loss,
    joint_loss as joint_loss,
    mean_joint_loss as mean_joint_loss,
    shared_exit_loss as shared_exit_loss,
    weighted_joint_loss as weighted_joint_loss,
)
from .metrics import DevMetrics as DevMetrics
from .recipes import RECIPES as RECIPES, Recipe as Recipe, Stage as Stage
from .rows import EncodedRows as EncodedRows, encode as encode
from .settings import TrainSettings as TrainSettings
from .standardising import standardise_heads as standardise_heads
from .trainer import TrainResult as TrainResult, run_recipe as run_recipe
