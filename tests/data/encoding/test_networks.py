"""Networks of other libraries, tiny and random, saved by the libraries themselves: as they are called offline."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from bbqrec_jax.data.encoding import encode
from bbqrec_jax.data.encoding.pictures import open_picture, picture_encoder
from bbqrec_jax.data.encoding.sentences import Sentences
from bbqrec_jax.errors import InputError

TITLES = ["red mug", "", "blue lamp", "red lamp"]
MODES = {"a.png": "RGB", "b.png": "RGBA", "c.png": "L"}


@pytest.fixture
def shop(tmp_path, monkeypatch):
  """Four items: one without a title, one with a broken picture."""
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  for place, (name, mode) in enumerate(MODES.items()):
    Image.new("RGB", (50, 40), (60 * place, 200, 90)).convert(mode).save(tmp_path / name)
  (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
  rows = zip(TITLES, [*MODES, "broken.png"], strict=True)
  lines = [json.dumps({"title": title, "image": image}) for title, image in rows]
  (tmp_path / "items.jsonl").write_text("\n".join(lines))
  return tmp_path


def made(shop, name, **settings):
  chosen = {"text": "none", "image": "none", "attributes": "none", "images": str(shop)} | settings
  counts = encode.features(shop, **chosen)
  return counts, np.load(shop / f"{name}_features.npy")


def looked_at(shop, transform, call):
  """The vectors of the pictures that are whole, one by one."""
  torch = pytest.importorskip("torch")
  with torch.inference_mode():
    return np.concatenate([call(transform(open_picture(shop / name, 512))[None]).numpy() for name in MODES])


def test_sentence_transformers_reads_texts_from_a_folder(shop):
  library = pytest.importorskip("sentence_transformers")
  transformers = pytest.importorskip("transformers")
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "mug", "lamp"]
  sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
  transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(shop / "bert")
  (shop / "vocab.txt").write_text("\n".join(words))
  transformers.BertTokenizerFast(vocab={word: row for row, word in enumerate(words)}).save_pretrained(shop / "bert")
  library.SentenceTransformer(str(shop / "bert")).save(str(shop / "network"))
  counts, vectors = made(shop, "text", text=f"sentence-transformers:{shop / 'network'}")
  assert counts == {"text": 3}
  expected = library.SentenceTransformer(str(shop / "network")).encode(TITLES, normalize_embeddings=True)
  expected[1] = 0
  assert len(np.unique(expected, axis=0)) == 4
  assert_allclose(vectors, expected, atol=1e-3)
  encoder = Sentences(str(shop / "network"), batch_size=2)
  encoder.limit = 4  # [CLS], two words and [SEP].
  assert encoder.cut(["red mug", "", "blue lamp red", "red mug lamp blue red"]) == 2
  with pytest.raises(InputError, match=r"sentence-transformers:.*nowhere.* could not be loaded.* folder that holds it"):
    Sentences(str(shop / "nowhere"), batch_size=2)


def test_timm_looks_at_pictures_with_weights_from_a_file(shop):
  timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
  network = timm.create_model("test_resnet", pretrained=False)
  torch.save(network.state_dict(), shop / "weights.pth")
  counts, vectors = made(shop, "image", image="timm:test_resnet", weights=str(shop / "weights.pth"))
  assert counts == {"image": 3}
  network.reset_classifier(0)
  network.eval()
  transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
  assert_allclose(vectors[:3], looked_at(shop, transform, network), rtol=2e-3, atol=1e-4)
  assert_array_equal(np.load(shop / "has_image.npy"), [True, True, True, False])
  with pytest.raises(InputError, match=r"--weights=.*weights\.pth: expected the weights of timm's test_vit, but it la"):
    picture_encoder("timm:test_vit", str(shop / "weights.pth"))
  with pytest.raises(InputError, match="nowhere"):
    picture_encoder("timm:test_resnet", str(shop / "nowhere"))


def test_open_clip_looks_at_pictures_with_weights_from_a_file(shop):
  open_clip, torch = pytest.importorskip("open_clip"), pytest.importorskip("torch")
  vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
  text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
  (shop / "tiny-clip.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
  open_clip.add_model_config(shop / "tiny-clip.json")
  network, _, transform = open_clip.create_model_and_transforms("tiny-clip")
  torch.save(network.state_dict(), shop / "weights.pt")
  counts, vectors = made(shop, "image", image="open_clip:tiny-clip", weights=str(shop / "weights.pt"))
  assert counts == {"image": 3}
  network.eval()
  assert_allclose(vectors[:3], looked_at(shop, transform, network.encode_image), rtol=2e-3, atol=1e-4)
  with pytest.raises(InputError, match="knows no published weights of tiny-clip"):
    picture_encoder("open_clip:tiny-clip", "")
