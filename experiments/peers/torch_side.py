"""The peers' side of `compare.py`: torch, vector-quantize-pytorch and transformers."""

import itertools
import sys

import torch
from serving import (
  BEAM,
  BLOCKS,
  CODES,
  HISTORY,
  ITEM_BATCH,
  ITEMS,
  LEVELS,
  SASREC,
  SEARCH_BATCH,
  STEPS,
  T5,
  TRAIN_BATCH,
  WIDTHS,
  real_histories,
  semantic_ids,
  serve,
)
from torch import nn


def quantizer(learnable):
  """ResidualVQ in the same autoencoder; its codewords follow averages, its default, or are learned as ours are."""
  from vector_quantize_pytorch import ResidualVQ

  def mlp(widths):
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
      layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])

  torch.manual_seed(0)
  encoder, decoder = mlp(WIDTHS), mlp(WIDTHS[::-1])
  choices = {"learnable_codebook": True, "ema_update": False} if learnable else {}
  vq = ResidualVQ(dim=WIDTHS[-1], num_quantizers=LEVELS, codebook_size=CODES, commitment_weight=0.25, **choices)
  optimizer = torch.optim.Adam([p for m in (encoder, decoder, vq) for p in m.parameters()], 1e-3)
  batches = [torch.randn(ITEM_BATCH, WIDTHS[0]) for _ in range(4)]

  def train():
    for module in (encoder, decoder, vq):
      module.train()
    for index in range(STEPS):
      x = batches[index % len(batches)]
      quantized, _, losses = vq(encoder(x)[None])
      loss = torch.mean(torch.square(decoder(quantized[0]) - x)) + losses.sum()
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()

  def tokenize():
    for module in (encoder, decoder, vq):
      module.eval()
    with torch.inference_mode():
      for index in range(BLOCKS):
        vq(encoder(batches[index % len(batches)])[None])[1].numpy()

  return {"train": train, "tokenize": tokenize}


def t5(sequences, by_length=False):
  """Hugging Face's T5 with a Python trie behind `prefix_allowed_tokens_fn`, as LETTER and its kind decode.

  Real histories are padded to the longest of each batch, users in the order of the file or of their lengths.
  """
  from transformers import T5Config, T5ForConditionalGeneration

  torch.manual_seed(0)
  pad, end, first = 0, 1, 2  # A level's codes stand after those of the levels before it.
  model = T5ForConditionalGeneration(
    T5Config(
      vocab_size=first + LEVELS * CODES, d_model=T5["width"], d_kv=T5["head_width"], d_ff=T5["mlp_width"],
      num_layers=T5["layers"], num_decoder_layers=T5["layers"], num_heads=T5["heads"], dropout_rate=T5["dropout"],
      pad_token_id=pad, eos_token_id=end, decoder_start_token_id=pad,
    )
  )  # fmt: skip
  tokens = torch.as_tensor(semantic_ids()) + first + CODES * torch.arange(LEVELS)
  children: dict[tuple[int, ...], list[int]] = {}
  known = set(map(tuple, tokens.tolist()))
  for item in known:
    for level in range(LEVELS):
      children.setdefault(item[:level], []).append(item[level])
  allowed = {prefix: sorted(set(codes)) for prefix, codes in children.items()}
  optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

  def histories(rows):
    return tokens[torch.randint(len(tokens), (rows, HISTORY))].reshape(rows, -1)

  inputs, targets = histories(TRAIN_BATCH), tokens[torch.randint(len(tokens), (TRAIN_BATCH,))]
  queries = [histories(SEARCH_BATCH) for _ in range(4)]

  def train():
    model.train()
    loss = model(input_ids=inputs, labels=targets).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  users = sorted(real_histories(sequences), key=len if by_length else lambda _: 0) if sequences else []

  def padded(batch):
    rows = [tokens[history].reshape(-1) for history in batch]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

  real = [padded(users[first : first + SEARCH_BATCH]) for first in range(0, len(users), SEARCH_BATCH)]

  def search(batches):
    model.eval()
    valid = []
    with torch.inference_mode():
      for query in batches:
        found = model.generate(
          input_ids=query, attention_mask=(query != pad).long(), num_beams=BEAM, num_return_sequences=BEAM,
          max_new_tokens=LEVELS, min_new_tokens=LEVELS, do_sample=False, early_stopping=True,
          prefix_allowed_tokens_fn=lambda _, sofar: allowed.get(tuple(sofar[1:].tolist()), [end]),
        )  # fmt: skip
        valid += [tuple(row[1 : 1 + LEVELS]) in known for row in found.tolist()]
    return sum(valid) / len(valid)

  return {"train": train, "generate": lambda: search(queries), "rank": lambda: search(real)}


def sasrec():
  """RecBole's SASRec with its cross-entropy, over the state of every position instead of the last alone."""
  from recbole.model.sequential_recommender.sasrec import SASRec

  class EveryPosition(SASRec):
    def gather_indexes(self, output, gather_index):
      del gather_index
      return output.reshape(-1, output.shape[-1])

  class Catalogue:
    def num(self, field):
      del field
      return ITEMS + 1  # Item 0 is padding.

  config = {
    "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "length",
    "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": SASREC["length"], "device": torch.device("cpu"),
    "n_layers": SASREC["layers"], "n_heads": SASREC["heads"], "hidden_size": SASREC["width"],
    "inner_size": SASREC["mlp_width"], "hidden_dropout_prob": SASREC["dropout"],
    "attn_dropout_prob": SASREC["dropout"], "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "initializer_range": 0.02, "loss_type": "CE",
  }  # fmt: skip
  torch.manual_seed(0)
  model = EveryPosition(config, Catalogue())
  optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
  shape = (SASREC["batch"], SASREC["length"])
  batch = {
    "item_list": torch.randint(1, ITEMS + 1, shape), "length": torch.full(shape[:1], SASREC["length"]),
    "item": torch.randint(1, ITEMS + 1, (shape[0] * shape[1],)),
  }  # fmt: skip

  def train():
    model.train()
    loss = model.calculate_loss(batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  return {"train": train}


if __name__ == "__main__":
  what, sequences = sys.argv[1:]
  sides = {
    "t5": lambda: t5(sequences), "t5_by_length": lambda: t5(sequences, by_length=True), "sasrec": sasrec,
    "quantizer_learned": lambda: quantizer(True), "quantizer_averages": lambda: quantizer(False),
  }  # fmt: skip
  serve(sides[what]())
