"""Training the reference networks."""

from evenkeel.train.augment import crop_and_flip as crop_and_flip
from evenkeel.train.augment import drawn_anew as drawn_anew
from evenkeel.train.detection import flipped_boxes as flipped_boxes
from evenkeel.train.devices import launched as launched
from evenkeel.train.episodes import fit_episodes as fit_episodes
from evenkeel.train.loop import fit as fit
from evenkeel.train.recipe import RECIPES as RECIPES
from evenkeel.train.recipe import Recipe as Recipe
from evenkeel.train.recipe import recipe as recipe
from evenkeel.train.segmentation import crops as crops
from evenkeel.train.segmentation import foreground_loss as foreground_loss
