"""COLUMNS -> COEFFICIENTS. In: the columns of a whole optimizer batch (log-probs, versions, turns, rewards)
and a recipe. Out: for every policy token the detached number that multiplies grad log pi, factors for this
step's learning rate, and metrics. Invariant: coefficients are the gradient of the published surrogate, shown
against float64 autograd in the tests. Pure: no model, no config file, no process group; blocks on nobody.
"""

from async_rl.objective.coefficients import coefficients
from async_rl.objective.columns import Coefficients, Columns
from async_rl.objective.state import ObjectiveState

__all__ = ["Coefficients", "Columns", "ObjectiveState", "coefficients"]
