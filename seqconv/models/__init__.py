"""Whole models made of this package's layers."""

from seqconv.models.hyenadna import CharacterTokenizer as CharacterTokenizer
from seqconv.models.hyenadna import HyenaDNA as HyenaDNA
