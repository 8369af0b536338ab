"""The dense layers of every module here: flax's, with `ops.products.dense_product`."""

import functools

import flax.linen as nn

from bbqrec_jax.ops.products import dense_product

Dense = functools.partial(nn.Dense, dot_general=dense_product)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=dense_product)
