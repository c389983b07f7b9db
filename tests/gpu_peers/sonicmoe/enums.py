from enum import Enum


class ActivationType(Enum):
    SWIGLU = "swiglu"
