"""Training a lent model for a few steps under several settings, and comparing what it lost, in pairs."""

from fullrank.errors import TrialError
from fullrank.trials.course import Course, Settings
from fullrank.trials.data import Data, of_batches, of_task
from fullrank.trials.objective import Example, NextToken, Objective, OwnLoss, TargetLoss, YourLoss, objective_for
from fullrank.trials.paired import Difference, paired
from fullrank.trials.rates import RATES, Rates, best_rate
from fullrank.trials.recommendations import RECOMMENDATIONS, Recommendation, recommendations
from fullrank.trials.task import Task, task_for
from fullrank.trials.training import judged, train
from fullrank.trials.trial import Trial, trial

__all__ = [
    "RATES",
    "RECOMMENDATIONS",
    "Course",
    "Data",
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
    "Trial",
    "TrialError",
    "YourLoss",
    "best_rate",
    "judged",
    "objective_for",
    "of_batches",
    "of_task",
    "paired",
    "recommendations",
    "task_for",
    "train",
    "trial",
]
