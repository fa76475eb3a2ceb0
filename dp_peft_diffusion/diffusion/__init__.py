"""Base models, adapters, images, objectives and sampling."""
