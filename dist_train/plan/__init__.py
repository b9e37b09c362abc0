"""`dist-train plan`: what a stage will take on GPUs that are not here, by arithmetic from stated assumptions.

`machine` says what a GPU and its links are sold for and how much of that is assumed to be reached, `shapes` how large
the models are, `training` and `generation` do the sums, `report` prints each with its formula.
"""

from dist_train.plan.generation import plan_generation
from dist_train.plan.machine import GPUS, Assumptions, Machine
from dist_train.plan.report import Entry, Plan, render
from dist_train.plan.shapes import llama_of, stage_of
from dist_train.plan.training import plan_training

__all__ = [
    "GPUS",
    "Assumptions",
    "Entry",
    "Machine",
    "Plan",
    "llama_of",
    "plan_generation",
    "plan_training",
    "render",
    "stage_of",
]
