from .address import Cluster
from .items import GivenUp, Parts, file_number, grown
from .pool import worked

__all__ = ["Cluster", "GivenUp", "Parts", "file_number", "grown", "worked"]
