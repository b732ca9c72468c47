"""Lightning and torchmetrics, without their advice and adverts: import them from here."""

import contextlib
import logging
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.fabric.plugins.io import TorchCheckpointIO
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from torchmetrics import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy

for _name in ("lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # importing them sets another

__all__ = [
    "MeanMetric",
    "MulticlassAccuracy",
    "TensorBoardLogger",
    "TorchCheckpointIO",
    "WandbLogger",
    "lightning",
    "quiet",
]


@contextlib.contextmanager
def quiet():
    """Hides what these libraries warn of; warnings of others, and errors, come through."""
    with warnings.catch_warnings():
        for module in ("lightning", "torchmetrics", "tensorboard", "torch.utils.tensorboard"):
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
        for text in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*"):
            warnings.filterwarnings("ignore", message=text)
        yield
