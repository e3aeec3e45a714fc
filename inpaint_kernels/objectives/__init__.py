"""Training objectives of published inpainting methods: all their terms from one call."""

from ._objective import Objective
from ._settings import AdversarialSettings, Settings
from ._terms import DiscriminatorOutput
from .aot_gan import AOTGANObjective, AOTGANSettings, AOTGANTerms
from .cmt import CMTObjective, CMTSettings, CMTTerms
from .coordfill import CoordFillObjective, CoordFillSettings, CoordFillTerms
from .ctn import CTNObjective, CTNSettings, CTNTerms, TFormerObjective
from .deepfill import DeepFillObjective, DeepFillSettings, DeepFillTerms
from .edge_connect import EdgeConnectObjective, EdgeConnectSettings, EdgeConnectTerms
from .lama import LaMaObjective, LaMaSettings, LaMaTerms
from .mat import MATObjective, MATSettings, MATTerms
from .partial_conv import PartialConvObjective, PartialConvSettings, PartialConvTerms
from .transcnn_hae import TransCNNHAEObjective, TransCNNHAESettings, TransCNNHAETerms

__all__ = [
    "AOTGANObjective",
    "AOTGANSettings",
    "AOTGANTerms",
    "AdversarialSettings",
    "CMTObjective",
    "CMTSettings",
    "CMTTerms",
    "CTNObjective",
    "CTNSettings",
    "CTNTerms",
    "CoordFillObjective",
    "CoordFillSettings",
    "CoordFillTerms",
    "DeepFillObjective",
    "DeepFillSettings",
    "DeepFillTerms",
    "DiscriminatorOutput",
    "EdgeConnectObjective",
    "EdgeConnectSettings",
    "EdgeConnectTerms",
    "LaMaObjective",
    "LaMaSettings",
    "LaMaTerms",
    "MATObjective",
    "MATSettings",
    "MATTerms",
    "Objective",
    "PartialConvObjective",
    "PartialConvSettings",
    "PartialConvTerms",
    "Settings",
    "TFormerObjective",
    "TransCNNHAEObjective",
    "TransCNNHAESettings",
    "TransCNNHAETerms",
]
