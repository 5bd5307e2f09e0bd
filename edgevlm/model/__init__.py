"""The model: a vision-language model built from a spec; `edgevlm.model.vlm` holds the module."""
