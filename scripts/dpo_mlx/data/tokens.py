"""Checks that a tokenizer fits the model's embedding, and encodes text with it."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from ..files.errors import UserError
from ..files.text import reason

# The names of the token embedding in mlx-lm's architectures.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings")
WRONG_TOKENIZER = "use the tokenizer files of these weights, or download the model again"


def check(model: nn.Module, tokenizer: Any) -> None:
    """Raises UserError when the embedding has no row for a token, or no token ends a turn. Stores
    the number of rows on the tokenizer, for `encode`.

    MLX does not check this: for an id beyond the last row it reads memory outside the embedding.
    """
    rows = embedding_rows(model)
    tokenizer.embedding_rows = rows
    # Some models have added tokens without an embedding row, such as Gemma 3's image tokens. They
    # do not occur in ordinary text, and `encode` refuses text that contains one.
    added_tokens = tokenizer.get_added_vocab()
    tokens = (item for item in tokenizer.get_vocab().items() if item[0] not in added_tokens)
    token, number = max(tokens, key=lambda item: item[1], default=("", 0))
    if rows is not None and number >= rows:
        raise UserError(_no_row(token, number, rows))
    stop_ids = tokenizer.eos_token_ids
    if not stop_ids:
        raise UserError(
            "model: its tokenizer has no token that ends a turn; set eos_token in the model's "
            "tokenizer_config.json, or eos_token_id in its config.json"
        )
    for stop_id in stop_ids:
        if type(stop_id) is not int or stop_id < 0 or (rows is not None and stop_id >= rows):
            raise UserError(
                f"model: eos_token_id has {str(stop_id)[:60]}, but the embedding's ids are 0 to "
                f"{(rows or 0) - 1}; correct it in the model's config.json and "
                "generation_config.json"
            )


def embedding_rows(model: nn.Module) -> int | None:
    """Rows of the model's token embedding. None when no module has one of the names above."""
    for name, module in model.named_modules():
        is_embedding = isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        if is_embedding and name.rpartition(".")[2] in EMBEDDINGS:
            return module.weight.shape[0]
    return None


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, without special tokens around it.

    Raises UserError when the tokenizer fails, or the embedding has no row for an id.
    """
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except BaseException as error:
        if not is_fault(error):
            raise
        raise UserError(
            f"model: its tokenizer fails ({reason(error)}); {WRONG_TOKENIZER}"
        ) from error
    rows, largest = getattr(tokenizer, "embedding_rows", None), max(ids, default=0)
    if rows is not None and largest >= rows:
        raise UserError(_no_row(tokenizer.convert_ids_to_tokens(largest), largest, rows))
    return ids


def markup(tokenizer: Any) -> dict[int, str]:
    """The special tokens that chat templates write, by id. Text must not contain them.

    Leaves out the token for unknown text. Tokens that were added for ordinary text, such as
    <think>, are not special.
    """
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number != tokenizer.unk_token_id
    }


def _no_row(token: str, number: int, rows: int) -> str:
    return (
        f"model: its tokenizer gives the token {token[:60]!r} the id {number}, but the embedding "
        f"has {rows} rows, for ids up to {rows - 1}; {WRONG_TOKENIZER}"
    )


def is_fault(error: BaseException) -> bool:
    """Whether the function that was called failed. True for an Exception and for a panic in a Rust
    library, such as the tokenizer, which is only a BaseException.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
