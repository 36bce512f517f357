"""SimSiam: exploring simple siamese representation learning (Chen and He, 2021), from lightly's heads and loss."""

from __future__ import annotations

from collections.abc import Sequence

from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from torch import Tensor, nn

from poserelay.errors import UserError

from .comparison import Comparison, LevelOutputs, widen


class SimSiam(nn.Module):
    """The siamese network over a backbone's deepest map; two forwards, so BN's statistics are of one view each.

    The official code freezes a bias before the projection head's last BN, which lightly's head does not have.

    Args:
        backbone: turns images into a list of maps, fine to coarse.
        channels: of those maps.
        width: of the projection head and the outputs.
        prediction_width: of the prediction head's hidden layer.
    """

    terms = ("conv5",)
    loss_range = (0.0, -1.0)
    judged_from = 0.0
    sync_batch_norm = True

    def __init__(
        self, backbone: nn.Module, channels: Sequence[int], *, width: int = 2048, prediction_width: int = 512
    ) -> None:
        super().__init__()
        if min(width, prediction_width) < 1:
            raise UserError(f"width is {width} and prediction_width {prediction_width}; give numbers of at least 1")
        self.backbone = backbone
        self.projection_head = SimSiamProjectionHead(channels[-1], width, width)
        self.prediction_head = SimSiamPredictionHead(width, prediction_width, width)
        self.distance = NegativeCosineSimilarity()

    def forward(self, view1: Tensor, view2: Tensor) -> LevelOutputs:
        """Encode both views, normalised images `[B, 3, H, W]`."""
        (p1, z1), (p2, z2) = self.encode(view1), self.encode(view2)
        return LevelOutputs(p1, z1, p2, z2)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (prediction, projection), each `[B, width]`, of images `[B, 3, H, W]`."""
        z = self.projection_head(self.backbone(images)[-1].mean((-2, -1)))
        return self.prediction_head(z), z

    def compare(self, outputs: LevelOutputs) -> Comparison:
        """Eq. 4: half of D(p1, stopgrad(z2)) and half of D(p2, stopgrad(z1))."""
        p1, z1, p2, z2 = map(widen, outputs)
        loss = (self.distance(p1, z2.detach()) + self.distance(p2, z1.detach())) / 2
        return Comparison(loss, loss[None], [z1])

    def predictors(self) -> list[nn.Parameter]:
        """The prediction head's parameters."""
        return list(self.prediction_head.parameters())

    def after_step(self) -> None:
        """Nothing to do."""
