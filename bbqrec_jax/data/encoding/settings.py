"""How items' features are made: every choice with its default and one sentence."""

import dataclasses

from bbqrec_jax.utils.settings import setting


@dataclasses.dataclass(frozen=True)
class FeatureSettings:
  """What `features` can be told; the flags of `bbqrec features` and the keywords of `bbqrec_jax.features`."""

  text: str = setting("tfidf", "What reads titles, descriptions, brands and categories: tfidf (hashed words and pairs"
                      " of words, without a network), sentence-transformers:NAME (or a folder), or none.")  # fmt: skip
  image: str = setting("plain", "What looks at pictures: plain (colours and edges, without any network), timm:NAME,"
                       " open_clip:NAME, or none.")  # fmt: skip
  attributes: str = setting("tfidf", "What reads brands, categories and prices: tfidf (hashed, one by one) or none.",
                            choices=("tfidf", "none"))  # fmt: skip
  weights: str = setting("", "The file of the network's weights; of open_clip also the tag of published ones.")
  images: str = setting("", "Where the pictures are, if not where bbqrec prepare found them; they are matched to items"
                        " as there.")  # fmt: skip
  like: str = setting("", "A data set whose features tfidf made: make these in the very same way, as a tokenizer"
                      " that was trained on those asks for of new items.")  # fmt: skip
  text_width: int = setting(256, "Numbers an item of tfidf's text features.", least=2, most=4096)
  attribute_width: int = setting(64, "Numbers an item of the attributes' features.", least=2, most=4096)
  batch_size: int = setting(256, "Items that are encoded at once.", most=65536)
  seed: int = setting(0, "Of tfidf's projection.", least=0, most=2**32 - 1)
