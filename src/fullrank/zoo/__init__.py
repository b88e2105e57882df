"""Reference models, each readable in one sitting: one transformer of plain options, one state-space model."""

from fullrank.zoo.configuration import TransformerConfig
from fullrank.zoo.output import Prediction
from fullrank.zoo.state_space import Decay, StateSpace, StateSpaceConfig
from fullrank.zoo.transformer import Transformer

__all__ = ["Decay", "Prediction", "StateSpace", "StateSpaceConfig", "Transformer", "TransformerConfig"]
