"""The vocabulary: every metric that can stand in a table, and what it means."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fullrank.metrics.definition import Definition
from fullrank.metrics.vocabulary_of_attention import ATTENTION
from fullrank.metrics.vocabulary_of_gradients import GRADIENTS
from fullrank.metrics.vocabulary_of_outputs import OUTPUTS
from fullrank.metrics.vocabulary_of_spectra import SPECTRA
from fullrank.metrics.vocabulary_of_states import STATES
from fullrank.metrics.vocabulary_of_weights import WEIGHTS

__all__ = ["VOCABULARY"]

VOCABULARY: Final[Mapping[str, Definition]] = MappingProxyType(
    {definition.name: definition for definition in (*STATES, *SPECTRA, *ATTENTION, *GRADIENTS, *WEIGHTS, *OUTPUTS)}
)
