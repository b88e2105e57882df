"""Training a lent model for a few steps under several settings, and comparing what it lost, in pairs."""

from fullrank.errors import TrialError
from fullrank.trials.objective import Example, NextToken, Objective, OwnLoss, TargetLoss, YourLoss, objective_for
from fullrank.trials.paired import Difference, paired
from fullrank.trials.rates import RATES, Rates, best_rate
from fullrank.trials.recommendations import RECOMMENDATIONS, Recommendation, recommendations
from fullrank.trials.task import Task, task_for
from fullrank.trials.training import Course, Settings, train

__all__ = [
    "RATES",
    "RECOMMENDATIONS",
    "Course",
    "Difference",
    "Example",
    "NextToken",
    "Objective",
    "OwnLoss",
    "Rates",
    "Recommendation",
    "Settings",
    "TargetLoss",
    "Task",
    "TrialError",
    "YourLoss",
    "best_rate",
    "objective_for",
    "paired",
    "recommendations",
    "task_for",
    "train",
]
