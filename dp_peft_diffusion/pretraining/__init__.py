"""Makes a base from public images. NOT private: nothing in this room may see an image that must not leak."""

from dp_peft_diffusion.pretraining.loop import pretrain

__all__ = ["pretrain"]
