"""A model's tokenizer: does it belong to the model's embedding, and does it work?"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from ..files.errors import UserError
from ..files.text import reason

# How mlx-lm's architectures call the embedding of the tokens.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings")
AGAIN = "use the tokenizer's files that belong to these weights, or download the model again"


def check(model: nn.Module, tokenizer: Any) -> None:
    """Raises UserError when the tokenizer has tokens that the embedding lacks, or cannot end a
    turn. Notes the embedding's rows on the tokenizer, for `encode`.

    MLX reads a row that an embedding does not have without an error, from memory beyond it.
    """
    rows = embedding_rows(model)
    tokenizer.embedding_rows = rows
    # Some models come with added tokens that their embedding lacks, as Gemma 3's for images. None
    # of them is in ordinary text; `encode` refuses the text that has one.
    added = tokenizer.get_added_vocab()
    tokens = (item for item in tokenizer.get_vocab().items() if item[0] not in added)
    token, number = max(tokens, key=lambda item: item[1], default=("", 0))
    if rows is not None and number >= rows:
        raise UserError(_no_row(token, number, rows))
    ends = tokenizer.eos_token_ids
    if not ends:
        raise UserError(
            "model: its tokenizer has no token that ends a turn; set eos_token in the model's "
            "tokenizer_config.json, or eos_token_id in its config.json"
        )
    for end in ends:
        if type(end) is not int or end < 0 or (rows is not None and end >= rows):
            raise UserError(
                f"model: eos_token_id has {str(end)[:60]}, but the embedding's tokens are 0 to "
                f"{(rows or 0) - 1}; correct it in the model's config.json and "
                "generation_config.json"
            )


def embedding_rows(model: nn.Module) -> int | None:
    """The number of tokens that a model knows; None for an embedding of another name."""
    for name, module in model.named_modules():
        embedding = isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        if embedding and name.rpartition(".")[2] in EMBEDDINGS:
            return module.weight.shape[0]
    return None


def encode(tokenizer: Any, text: str) -> list[int]:
    """The text's token ids, without any that the tokenizer would add.

    Raises UserError when the tokenizer fails, or gives an id that the embedding lacks.
    """
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except BaseException as error:
        if not is_fault(error):
            raise
        raise UserError(f"model: its tokenizer fails ({reason(error)}); {AGAIN}") from error
    rows, largest = getattr(tokenizer, "embedding_rows", None), max(ids, default=0)
    if rows is not None and largest >= rows:
        raise UserError(_no_row(tokenizer.convert_ids_to_tokens(largest), largest, rows))
    return ids


def _no_row(token: str, number: int, rows: int) -> str:
    return (
        f"model: token {token[:60]!r} of its tokenizer has the id {number}, but the embedding has "
        f"{rows} rows, for ids up to {rows - 1}; {AGAIN}"
    )


def is_fault(error: BaseException) -> bool:
    """Whether this is a fault of what was called. A panic of a library in Rust, as the tokenizer's,
    is one, though Python does not count it among the exceptions.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
