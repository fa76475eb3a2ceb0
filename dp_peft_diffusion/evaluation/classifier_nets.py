"""The nets that classifiers.py trains: a shape (c, h, w) and a number of classes in, an untrained net out."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

Shape = tuple[int, int, int]  # channels, height, width


def small_cnn(shape: Shape, num_classes: int, width: int = 16) -> nn.Sequential:
    """Two convolutions and two linear layers: seconds where the others take hours."""
    c, h, w = shape
    return nn.Sequential(
        nn.Conv2d(c, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(2 * width * -(-h // 4) * -(-w // 4), 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, num_classes),
    )


def dpdm_cnn(shape: Shape, num_classes: int) -> nn.Sequential:
    """The CNN of DPDM's released code (arXiv 2210.09929): three convolutions without padding, dropout of one half.

    Images below 18 pixels a side would come out empty: theirs are 28. Their edges are repeated up to 18.
    """
    c, *sides = shape
    left = [((max(side, 18) - 2) // 2 - 2) // 2 - 2 for side in sides]
    return nn.Sequential(
        _at_least(18, shape),
        nn.Conv2d(c, 32, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(32, 64, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(64, 128, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * left[0] * left[1], 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, num_classes),
    )


def wide_resnet(shape: Shape, num_classes: int, depth: int = 40, width: int = 4) -> nn.Sequential:
    """WRN-depth-width of Zagoruyko and Komodakis (arXiv 1605.07146, table 1), for images of about 32 pixels a side.

    depth: 6 n + 4, for n blocks in each of three groups.
    """
    channels = [16, 16 * width, 32 * width, 64 * width]
    layers = [_at_least(8, shape), nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)]
    for group, (inputs, outputs) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
        for block in range((depth - 4) // 6):
            first = block == 0
            layers.append(WideBlock(inputs if first else outputs, outputs, stride=2 if first and group else 1))
    layers += [nn.BatchNorm2d(channels[-1]), nn.ReLU(inplace=True)]
    return _initialised(nn.Sequential(*layers, *_head(channels[-1], num_classes)))


class WideBlock(nn.Module):
    """Two convolutions, each after its norm and ReLU, beside a shortcut. torchvision's blocks have the norms behind."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h / stride, w / stride)."""
        active = torch.relu(self.norm1(x))
        shortcut = x if self.projection is None else self.projection(active)
        return shortcut + self.conv2(torch.relu(self.norm2(self.conv1(active))))


def resnet(shape: Shape, num_classes: int, depth: int = 110) -> nn.Sequential:
    """ResNet-depth for images of about 32 pixels a side (He et al., arXiv 1512.03385, section 4.2).

    depth: 6 n + 2, for n blocks in each of three groups. Where the shape changes, the shortcut is a convolution, as in
    DPImageBench; He et al. pad with zeros.
    """
    layers: list[nn.Module] = [
        _at_least(8, shape),
        nn.Conv2d(shape[0], 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
    ]
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        for block in range((depth - 2) // 6):
            narrower = block == 0 and inputs != outputs
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
            layers.append(BasicBlock(inputs, outputs, 2, shortcut) if narrower else BasicBlock(outputs, outputs))
    return _initialised(nn.Sequential(*layers, *_head(64, num_classes)))


def _at_least(side: int, shape: Shape) -> nn.Module:
    """Repeats the edges of images that are smaller than `side`."""
    down, right = (max(side - length, 0) for length in shape[1:])
    if not down and not right:
        return nn.Identity()
    return nn.ReplicationPad2d((right // 2, right - right // 2, down // 2, down - down // 2))


def _head(channels: int, num_classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)


def _initialised(net: nn.Sequential) -> nn.Sequential:
    """He's normal initialisation of the convolutions, as both papers use; torch's own is narrower."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return net
