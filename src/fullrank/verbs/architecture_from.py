"""What `Architecture.from_model` and `Architecture.from_config` do."""

from fullrank.verbs.architecture_from_config import architecture_from_config
from fullrank.verbs.architecture_from_model import architecture_from_model

__all__ = ["architecture_from_config", "architecture_from_model"]
