"""What the three releases of the reviews are made of: categories, names and places of files, names of fields.

2014: McAuley et al., Image-based recommendations on styles and substitutes; 2018: Ni et al., Justifying recommendations
using distantly-labeled reviews and fine-grained aspects; 2023: Hou et al., Bridging language and items for retrieval
and recommendation.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bbqrec_jax.errors import InputError

_EACH = (
  "Automotive Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics"
  " Grocery_and_Gourmet_Food Home_and_Kitchen Kindle_Store Movies_and_TV Musical_Instruments Office_Products"
  " Patio_Lawn_and_Garden Pet_Supplies Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games"
)
_LATER = (
  " All_Beauty Appliances Arts_Crafts_and_Sewing Gift_Cards Industrial_and_Scientific Magazine_Subscriptions Software"
)


class Release(NamedTuple):
  """One release.

  Attributes:
    categories: whose files there are.
    log: fields of a review, by what they are in `PreparationSettings`.
    items: fields of an item, likewise.
    reviews: names that a category's reviews have, {0} being the category; the 5-core first, where there is one.
    ratings: columns of the table of all ratings, `{0}.csv`, which has no header; none where no recipe reads it.
    meta: names that its items have.
    pictures: the name of its pictures' features; "" where the release has none.
    place: where the publisher offers each of the names.
  """

  categories: tuple[str, ...]
  log: Mapping[str, str]
  items: Mapping[str, str | tuple[str, ...]]
  reviews: tuple[str, ...]
  ratings: tuple[str, ...]
  meta: tuple[str, ...]
  pictures: str
  place: Mapping[str, str]


_SNAP = "http://snap.stanford.edu/data/amazon/productGraph"
_UCSD = "https://datarepo.eng.ucsd.edu/mcauley_group/data"

RELEASES = {
  "2014": Release(
    categories=(
      *_EACH.split(), "Amazon_Instant_Video", "Apps_for_Android", "Baby", "Beauty", "Health_and_Personal_Care",
    ),
    log={"user": "reviewerID", "item": "asin", "time": "unixReviewTime", "rating": "overall"},
    items={"item_id": "asin", "title": "title", "description": ("description",), "brand": "brand",
           "category": ("categories",), "price": "price", "image": "imUrl"},
    reviews=("reviews_{0}_5.json", "reviews_{0}.json"),
    ratings=(),
    meta=("meta_{0}.json",),
    pictures="image_features_{0}.b",
    place={"reviews": f"{_SNAP}/categoryFiles", "meta": f"{_SNAP}/categoryFiles",
           "pictures": f"{_SNAP}/image_features/categoryFiles"},
  ),
  "2018": Release(
    categories=(*_EACH.split(), *_LATER.split(), "AMAZON_FASHION", "Luxury_Beauty", "Prime_Pantry"),
    log={"user": "reviewerID", "item": "asin", "time": "unixReviewTime", "rating": "overall"},
    items={"item_id": "asin", "title": "title", "description": ("description",), "brand": "brand",
           "category": ("category",), "price": "price", "image": "imageURL"},
    reviews=("{0}_5.json", "{0}.json"),
    ratings=("item", "user", "rating", "time"),
    meta=("meta_{0}.json",),
    pictures="",
    place={"reviews": f"{_UCSD}/amazon_v2/categoryFilesSmall", "ratings": f"{_UCSD}/amazon_v2/categoryFilesSmall",
           "meta": f"{_UCSD}/amazon_v2/metaFiles2"},
  ),
  "2023": Release(
    categories=(*_EACH.split(), *_LATER.split(), "Amazon_Fashion", "Baby_Products", "Beauty_and_Personal_Care",
                "Handmade_Products", "Health_and_Household", "Health_and_Personal_Care", "Subscription_Boxes",
                "Unknown"),
    log={"user": "user_id", "item": "parent_asin", "time": "timestamp", "rating": "rating"},
    items={"item_id": "parent_asin", "title": "title", "description": ("description",), "brand": "store",
           "category": ("categories",), "price": "price", "image": "images"},
    reviews=("{0}.jsonl",),
    ratings=(),
    meta=("meta_{0}.jsonl",),
    pictures="",
    place={"reviews": f"{_UCSD}/amazon_2023/raw/review_categories", "meta": f"{_UCSD}/amazon_2023/raw/meta_categories"},
  ),
}  # fmt: skip


class Recipe(NamedTuple):
  """A data set as published results stand on it.

  All are made as the script of MQL4GRec (Zhai et al., 2025) makes them: of the table of all ratings, items without
  metadata or a picture are left out, and of a user and an item all but the first rating; then comes the 5-core.

  Attributes:
    release: of `RELEASES`.
    category: of the release.
    users: that there are afterwards, as published.
    items: likewise.
  """

  release: str
  category: str
  users: int
  items: int


# Users and items as MQL4GRec prints them of its three, and those of the Scientific of the same kind.
RECIPES = {
  "instruments": Recipe("2018", "Musical_Instruments", 17112, 6250),
  "arts": Recipe("2018", "Arts_Crafts_and_Sewing", 22171, 9416),
  "games": Recipe("2018", "Video_Games", 42259, 13839),
  "scientific": Recipe("2018", "Industrial_and_Scientific", 8317, 4344),
}


class Files(NamedTuple):
  """The files of a category; `pictures` is None where there are none, and `reviews` may be the table of ratings."""

  reviews: Path
  meta: Path
  pictures: Path | None


def check_category(release: str, category: str) -> None:
  """Refuses a category that a release does not have.

  Raises:
    InputError: if so; names the nearest.
  """
  if release not in RELEASES:
    raise InputError(f"expected a release of {', '.join(RELEASES)}, got {release!r}")
  known = RELEASES[release].categories
  if category not in known:
    close = difflib.get_close_matches(category, known, 3)
    raise InputError(
      f"expected a category of the release of {release}, got {category!r}; "
      + (f"did you mean {', '.join(close)}?" if close else f"they are {', '.join(sorted(known))}")
    )


def find_files(folder: Path, release: str, category: str, *, ratings: bool = False) -> Files:
  """The files of a category in a folder, as the publisher calls them, packed or unpacked.

  Args:
    folder: where they are.
    release: of `RELEASES`.
    category: of the release.
    ratings: whether the table of all ratings is wanted, in place of the reviews.

  Raises:
    InputError: if some are not there; says which, and where the publisher offers them.
  """
  check_category(release, category)
  of = RELEASES[release]
  found: dict[str, Path | None] = {}
  missing = []
  log = ("ratings", ("{0}.csv",)) if ratings else ("reviews", of.reviews)
  for kind, names in (log, ("meta", of.meta)):
    endings = ("", ".gz") if kind == "ratings" else (".gz", "")  # As it is published first.
    wanted = [name.format(category) + packed for name in names for packed in endings]
    found[kind] = next((folder / name for name in wanted if (folder / name).is_file()), None)
    if found[kind] is None:
      missing.append(f"{of.place[kind]}/{wanted[0]}")
  if missing:
    raise InputError(
      f"{folder}: expected the files of {category} of {release}, found not all; download {' and '.join(missing)}, and"
      " put them there"
    )
  pictures = folder / of.pictures.format(category) if of.pictures else None
  reviews, meta = found[log[0]], found["meta"]
  assert reviews is not None
  assert meta is not None
  return Files(reviews, meta, pictures if pictures is not None and pictures.is_file() else None)
