"""The one shape in which the rest of the program sees a network: images in, feature vectors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nostalgia.data.resizing import Resizing
from nostalgia.errors import UsageError
from nostalgia.models.dropout import DropoutKeys
from nostalgia.models.probe import SHAPE_ERRORS, Probe, probe

if TYPE_CHECKING:  # peft and transformers are imported where they are used: seconds of every command's start
    from peft import LoraConfig


def class_token(output: Any) -> Tensor:
    """ViT's convention: the class token after the final layer norm, (B, D)."""
    return output.last_hidden_state[:, 0]


def token_pair(output: Any) -> Tensor:
    """Distilled DeiT's convention: class and distillation token side by side, (B, 2 D).

    Its classifier is the mean of one linear head on each, which is one linear head on the pair.
    """
    return output.last_hidden_state[:, :2].flatten(1)


def pooled(output: Any) -> Tensor:
    """The model's own pooled output, (B, D) or (B, D, 1, 1) flattened."""
    return output.pooler_output.flatten(1)


def mean_of_tokens(output: Any) -> Tensor:
    """Mean over positions of (B, N, D) tokens or a (B, D, H, W) map, where a model names nothing better."""
    hidden = output.last_hidden_state
    return hidden.mean(1) if hidden.dim() == 3 else hidden.mean((-2, -1))


def flattened(output: Any) -> Tensor:
    """What a torchvision network gives once its classifier is gone, (B, D)."""
    return output.flatten(1)


class Backbone(nn.Module):
    """A network without classifier: ``forward(images (B, 3, H, W)) -> features (B, feature_dim)``.

    ``model`` is the library's own module, so that its tools can be used on it; ``mean`` and ``std`` are what
    images in [0, 1] are normalised with, ``resizing`` how an image becomes the square that the network is fed.
    Parameters on which the features do not depend (a mask token, say) do not require a gradient: DDP would
    wait for them.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Callable[[Any], Tensor] | None,
        *,
        resizing: Resizing,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        framework: str,
        source: str,
        arch: str | None = None,
        call: Mapping[str, Any] | None = None,
        bgr: bool = False,
    ) -> None:
        """``features`` reads the features out of the model's output (None: chosen from what the model gives).

        ``call`` holds further arguments of every forward call; ``bgr``: ``model`` wants blue first. ``source`` says where
        architecture and weights are from, ``arch`` torchvision's name of the network. Raises UsageError when the network
        cannot take images of ``image_size``.
        """
        super().__init__()
        self.model = model
        self.resizing = resizing
        self.mean = mean
        self.std = std
        self.framework = framework
        self.source = source
        self.arch = arch
        self.call = dict(call or {})
        self.bgr = bgr
        self.dropout: DropoutKeys | None = None  # set where masks are drawn by sample
        self.lora: LoraConfig | None = None  # set by attach_lora
        self.norm_frozen = False
        self.paused: frozenset[str] = frozenset()
        result = self._probe()
        self.features = features or _convention(model, result.output)
        shape = self.features(result.output).shape
        if len(shape) != 2:
            raise UsageError(f"{source} gives an output of shape {tuple(shape)}, not one feature vector an image")
        self.feature_dim = shape[1]
        self.unused = frozenset(result.unused(self.features(result.output)))
        for name, parameter in model.named_parameters():
            if name in self.unused:
                parameter.requires_grad_(False)
        self.eval()

    @property
    def image_size(self) -> int:
        """The side in pixels of the images that the network is fed."""
        return self.resizing.size

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of normalised ``images`` (B, 3, image_size, image_size)."""
        return self.features(self._run(self.model, images))

    def train(self, mode: bool = True) -> Backbone:
        """As ``nn.Module.train``, but batch-norm layers stay in evaluation mode under ``norm_frozen``."""
        super().train(mode)
        if self.norm_frozen:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def set_trainable(self, trainable: bool) -> None:
        """Freeze the whole backbone for a while (head warm-up), or make trainable again what was before.

        Set it before the model is wrapped: DDP and FSDP look at ``requires_grad`` once.
        """
        if not trainable:
            self.paused |= {name for name, value in self.named_parameters() if value.requires_grad}
        for name, value in self.named_parameters():
            if name in self.paused:
                value.requires_grad_(trainable)
        if trainable:
            self.paused = frozenset()

    def called_layers(self) -> tuple[str, ...]:
        """Names within ``model`` of the linear and convolution layers that are really called, in order."""
        return self._probe().called

    def runs(self) -> bool:
        """Whether the network takes images as it is now, its layers changed or not; by shapes alone."""
        try:
            probe(self.model, self._run, self.image_size)
        except (*SHAPE_ERRORS, AttributeError, NotImplementedError):
            return False
        return True

    def draws_in_training(self) -> bool:
        """Whether a forward pass in training mode draws from torch's generators (stochastic depth, dropout not by sample)."""
        keys = self.dropout or DropoutKeys()
        keys.samples = torch.zeros(2, dtype=torch.int32, device="meta")
        try:
            return probe(self.model, self._run, self.image_size, count=2, training=True).random
        finally:
            keys.samples = None

    def check_batch(self, size: int) -> None:
        """Raise UsageError where a batch of ``size`` images leaves a batch norm one value per channel to normalise by."""
        try:
            probe(self.model, self._run, self.image_size, count=size, training=True)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise UsageError(
                    f"dataset.batch_size={size}: a batch norm of {self.source} has a single value per channel at "
                    f"{self.image_size} x {self.image_size} pixels, by which nothing can be normalised; use "
                    f"dataset.batch_size={size + 1} or more, a larger dataset.image_size, or model.norm_statistics=frozen"
                ) from None

    def _probe(self) -> Probe:
        try:
            return probe(self.model, self._run, self.image_size)
        except SHAPE_ERRORS as error:
            reason = str(error).strip().splitlines()
            channels = getattr(getattr(self.model, "config", None), "num_channels", 3)
            if channels != 3:
                raise UsageError(
                    f"{self.source} takes images of {channels} channels; allowed are networks of 3, which grey images are "
                    "given as too"
                ) from error
            if isinstance(error, TypeError) and "required positional argument" in str(error):
                raise UsageError(
                    f"{self.source} needs more than pixel_values ({reason[0]}); allowed are networks of images alone"
                ) from error
            raise UsageError(
                f"{self.source} cannot take images of {self.image_size} x {self.image_size} pixels: "
                f"{reason[0] if reason else type(error).__name__}; choose another dataset.image_size"
            ) from error

    def _run(self, model: Callable[..., Any], images: Tensor) -> Any:
        if self.bgr:
            images = images.flip(1)
        if self.framework == "hf":
            return model(pixel_values=images, **self.call)
        return model(images)


def _convention(model: nn.Module, output: Any) -> Callable[[Any], Tensor]:
    """How to read the features of a model about whose architecture nothing is known here."""
    if getattr(output, "pooler_output", None) is not None:
        return pooled
    if getattr(output, "last_hidden_state", None) is None:
        raise UsageError(
            f"{type(model).__name__} gives no last_hidden_state: not a backbone that gives features; "
            "choose another model.model_id, or save the part of it that does by itself (save_pretrained)"
        )
    has_class_token = any(name.endswith("cls_token") for name, _ in model.named_parameters())
    return class_token if has_class_token and output.last_hidden_state.dim() == 3 else mean_of_tokens
