"""LeNet with two features, so that what it has learned can be drawn on paper (paper, Figure 2)."""

from torch import Tensor, nn


class LeNet2D(nn.Module):
    """LeNet-5 whose penultimate layer has two units, which a scatter plot shows as they are.

    5×5 convolutions of 6 (padded by 2) and 16 channels, each with ReLU and 2×2 maximum pooling; linear 120, 84, 2; linear N.
    The paper names the network and the two features; ReLU, maximum pooling and the linear layer from 84 to 2 are ours. Images
    below 12 pixels, of which nothing would be left, have the second convolution padded by 2, too.

    Input float ``[B, in_channels, image_size, image_size]``, ``image_size`` at least 4; output logits ``[B, num_classes]``.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        padding = 2 if image_size < 12 else 0
        side = (image_size // 2 + 2 * padding - 4) // 2
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=padding),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * side * side, 120),
            nn.ReLU(inplace=True),
            nn.Linear(120, 84),
            nn.ReLU(inplace=True),
            # No ReLU after it: the features fill the whole plane.
            nn.Linear(84, 2),
        )
        self.classifier = nn.Linear(2, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Float ``[B, 2]``: the point of each image in the plane in which the classifier draws its lines."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
