"""Adapted models in forms that other tools load: a LoRA, a whole model, bare slices."""
