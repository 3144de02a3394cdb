"""Models: configs, presets, the backbone and the language model."""
