"""A network of one's own: a vision encoder of `transformers`, saved as a folder."""

from transformers import ViTConfig, ViTModel

shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ViTModel(ViTConfig(image_size=16, patch_size=4, **shape)).save_pretrained("my_model")
