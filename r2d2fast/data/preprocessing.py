"""What becomes of an image, or an embedding, before the network sees it: enough to do the same elsewhere."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Kind = Literal["photographs", "small images", "embeddings"]


@dataclass(frozen=True)
class Preprocessing:
    """How evaluation makes the input of the network; training's augmentation is no part of it.

    Attributes:
        kind: ``"photographs"``: RGB images of any size; the short side is resized to ``resize`` by the antialiased filter
            ``interpolation``, and the centre cut out. ``"small images"``: images of this very size, as they are.
            ``"embeddings"``: rows of numbers, as they are, since what scales them is a part of the network.
        shape: of one input: (C, H, W), or (D,) of embeddings.
        mean, std: of each channel; the network's input is (pixel / ``divisor`` − mean) / std. Empty for embeddings.
        divisor: 255 where mean and std are in units of the full range, 1 where they are in units of pixel values, 0 … 255.
        resize: the short side of photographs in pixels; 0 for the others.
        interpolation: of photographs, ``"bilinear"`` or ``"bicubic"``.

    Raises ValueError for a kind that there is not.
    """

    kind: Kind
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    divisor: float = 1.0
    resize: int = 0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; accepted: {', '.join(get_args(Kind))}")

    def to_json(self) -> str:
        """As text that :meth:`from_json` reads, to the last bit of each number."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Preprocessing":
        """Raises ValueError or TypeError for other text."""
        values: dict[str, Any] = json.loads(text)
        return Preprocessing(**{name: tuple(one) if isinstance(one, list) else one for name, one in values.items()})  # type: ignore[arg-type]
