"""Which models of transformers can be upcycled. ``import clipup`` reads this, so it imports nothing."""

MODEL_TYPES = (
    *("clip", "clip_vision_model", "clip_text_model", "siglip", "siglip_vision_model", "siglip_text_model"),
    *("siglip2", "siglip2_vision_model", "siglip2_text_model", "vit", "dinov2", "dinov3_vit"),
    *("bert", "roberta", "xlm-roberta", "modernbert"),
)
"""transformers' names of the models that can be upcycled."""
SPARSE_PREFIX = "clipup_"
"""In front of the names of upcycled ones."""
