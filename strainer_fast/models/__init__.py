"""Networks: Siren, BatchedSiren, Strainer, Encoder; loading those of other libraries."""

from strainer_fast.models.architecture import Architecture
from strainer_fast.models.encoder import Encoder
from strainer_fast.models.foreign import load_foreign
from strainer_fast.models.siren import BatchedSiren, Siren
from strainer_fast.models.strainer import Strainer

__all__ = ["Architecture", "BatchedSiren", "Encoder", "Siren", "Strainer", "load_foreign"]
