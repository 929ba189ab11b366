"""A page to play with: `python -m piflow_jax.demo --checkpoint=runs/digits`.

It shows samples of a student next to its teacher's, from the same noise, with the times they took;
the way of one sample; a morph between two noises; and image to image. A student of latents takes
their autoencoder, `--vae`. One that reads text takes prompts of a prepared set, `--prompts`, and
its teacher's weights, `--teacher`; its teacher is not drawn. Needs `pip install -e ".[demo]"`.
"""

from piflow_jax.demo.command import main
from piflow_jax.demo.drawer import Drawer
from piflow_jax.demo.page import make_page
from piflow_jax.demo.server import serve

__all__ = ["Drawer", "main", "make_page", "serve"]
