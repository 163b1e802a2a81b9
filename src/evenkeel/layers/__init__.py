"""What the methods need to know of a layer: its weights as a matrix, its running statistics."""

from evenkeel.layers.composite import FORWARD_HOOKS as FORWARD_HOOKS
from evenkeel.layers.composite import expanded as expanded
from evenkeel.layers.composite import is_composite as is_composite
from evenkeel.layers.composite import register_composite as register_composite
from evenkeel.layers.composite import take_apart_ as take_apart_
from evenkeel.layers.copying import deepcopied as deepcopied
from evenkeel.layers.modes import being_captured as being_captured
from evenkeel.layers.modes import in_eval as in_eval
from evenkeel.layers.modes import is_captured as is_captured
from evenkeel.layers.modes import lasting_tensors as lasting_tensors
from evenkeel.layers.normalizers import RunningStatistics as RunningStatistics
from evenkeel.layers.normalizers import running_normalizers as running_normalizers
from evenkeel.layers.precision import lowered as lowered
from evenkeel.layers.precision import restore_precision as restore_precision
from evenkeel.layers.recurrent import Recurrent as Recurrent
from evenkeel.layers.weights import WeightLayer as WeightLayer
from evenkeel.layers.weights import chosen_paths as chosen_paths
from evenkeel.layers.weights import register_weight_layer as register_weight_layer
from evenkeel.layers.weights import registered_kinds as registered_kinds
from evenkeel.layers.weights import require_own_weight as require_own_weight
from evenkeel.layers.weights import weight_layer as weight_layer
from evenkeel.layers.wrapper import Wrapper as Wrapper
from evenkeel.layers.wrapper import called as called
from evenkeel.layers.wrapper import unwrapped as unwrapped
