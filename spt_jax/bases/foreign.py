"""Frozen bases from models that people wrote themselves, in Flax Linen, Flax NNX or plain JAX."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from spt_jax.bases.base import FrozenBase, tokenizer_hash
from spt_jax.bases.fingerprint import FINGERPRINT_VERSION, FOREIGN, Fingerprint
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.errors import ConfigError
from spt_jax.models.functional import FunctionalModel, Functions, functional_layout
from spt_jax.runtime import measure
from spt_jax.runtime.sharding import make_mesh, replicated, to_host

# The shape of the ids on which the functions are tried.
_ROWS, _TOKENS = 2, 5


def from_flax(
    params: PyTree,
    *,
    embed: Callable[..., Float[Array, "B T D"]],
    hidden: Callable[..., Float[Array, "B T D"]],
    logits: Callable[..., Float[Array, "B T V"]],
    tokenizer: Tokenizer | tokenizers.Tokenizer,
    max_positions: int,
    name: str,
    end_ids: Sequence[int] | None = None,
    masked: bool = True,
    mesh: Mesh | None = None,
) -> FrozenBase:
    """Makes a frozen base of a causal language model given as functions of its parameters.

    The functions are compiled with the parameters as an argument, so they must take all arrays from `params`: for
    Linen, `params` are the variables and the functions call `module.apply`; for NNX, `graphdef, params =
    nnx.split(model)` and the functions call `nnx.merge(graphdef, params)`.

    Methods that train input embeddings work with such a base. Generation has no cache, so each token costs as much as
    the whole sequence. `spt_jax.testing.check_model(base.model)` checks that the functions keep the rules below.

    Args:
      params: the parameters, a pytree of arrays. Those on devices of the mesh stay as they are placed; host arrays are
        replicated over the mesh.
      embed: (params, ids [B, T]) to the embeddings [B, T, D] of the ids, without position embeddings. Their dtype is
        that of the base.
      hidden: (params, x [B, T, D], positions [B, T], mask [B, T, T]) to hidden states [B, T, D]. Positions are those in
        a token's own sequence, whatever its index in the row. The mask is True at [b, i, j] where token i attends to
        token j, and replaces the module's causal mask. T may exceed `max_positions`; positions never do.
      logits: (params, hidden [B, T, D]) to next-token logits [B, T, V].
      tokenizer: a fast tokenizer of transformers, or a `tokenizers.Tokenizer`.
      max_positions: the maximum number of tokens of a sequence, virtual ones included.
      name: the name of the base in messages and saved prompts.
      end_ids: the ids that end an answer; default the EOS token of the tokenizer.
      masked: False for a module without positions and mask: `hidden` is then called with (params, x), must be causal,
        and sees each sequence alone, from index 0, with padding after it. Examples do not share rows.
      mesh: rows of a batch are split over it; its axes "tensor" and "sequence" must be 1. Default one device.

    Returns:
      The base.

    Raises:
      ConfigError: a parameter is no array or not finite, or is on other devices than those of the mesh; a function
        fails, captures parameters, or returns another shape or dtype; the tokenizer is not a fast one, has ids that the
        model lacks, or has no EOS token while `end_ids` is not given; or a size, an id or the mesh is invalid.
    """
    measure.keep_compiled_programs()
    if isinstance(max_positions, bool) or not isinstance(max_positions, int) or max_positions < 1:
        raise ConfigError(f"max_positions is {max_positions!r}; it must be an integer of at least 1")
    if not name or not isinstance(name, str):
        raise ConfigError(f"name is {name!r}; give the model a name, which saved prompts record")
    mesh = mesh or make_mesh()
    for axis in ("tensor", "sequence"):
        if mesh.shape[axis] > 1:
            raise ConfigError(f"mesh.{axis} is {mesh.shape[axis]}; for a model given as functions it must be 1")
    params = _placed(params, mesh)
    weights = _digest(params)
    functions = Functions(embed, hidden, logits, masked)
    width, vocab_size, dtype = _sizes(functions, params)
    fast, ends = _with_ends(_fast(tokenizer), end_ids, vocab_size)
    sizes = {"vocab_size": vocab_size, "width": width, "max_positions": max_positions}
    facts = {"family": FOREIGN, "name": name, **sizes}
    return FrozenBase(
        name=name,
        revision=None,
        model=FunctionalModel(params, functions, functional_layout(**sizes, packs=masked), dtype, mesh),
        tokenizer=fast,
        end_ids=ends,
        fingerprint=Fingerprint(facts, weights, tokenizer_hash(fast), FINGERPRINT_VERSION),
    )


def _placed(params: Any, mesh: Mesh) -> Any:
    """Returns the parameters on the devices of the mesh.

    Raises:
      ConfigError: a leaf is no array, or is on other devices.
    """
    devices = set(mesh.devices.flat)

    def place(path: Any, leaf: Any) -> jax.Array:
        where = f"params{jax.tree_util.keystr(path)}"
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind != "O":
            return jax.device_put(leaf, replicated(mesh))
        if not isinstance(leaf, jax.Array):
            raise ConfigError(f"{where} is a {type(leaf).__name__}; every leaf of params must be an array")
        if leaf.sharding.device_set == devices:
            return leaf
        if leaf.committed:
            raise ConfigError(
                f"{where} is not on the {len(devices)} devices of the mesh; place it there, or give `mesh`"
            )
        return jax.device_put(leaf, replicated(mesh))

    placed = jax.tree_util.tree_map_with_path(place, params)
    if not jax.tree.leaves(placed):
        raise ConfigError("params has no arrays")
    return placed


def _digest(params: Any) -> str:
    """Returns the SHA-256 of the names, dtypes, shapes and values of all leaves, one leaf on the host at a time.

    Raises:
      ConfigError: a leaf has values that are not finite.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = jax.tree_util.keystr(path)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        values = np.ascontiguousarray(to_host(leaf))
        if jnp.issubdtype(values.dtype, jnp.inexact) and not np.isfinite(values.astype(np.float32)).all():
            raise ConfigError(f"params{where} has values that are not finite")
        digest.update(f"{where} {values.dtype.name} {values.shape}\n".encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _sizes(functions: Functions, params: Any) -> tuple[int, int, Any]:
    """Returns the width, the vocabulary size and the dtype, from the shapes of what the functions return.

    Raises:
      ConfigError: a function fails, captures parameters, or returns another shape or dtype than it must.
    """
    ids = jax.ShapeDtypeStruct((_ROWS, _TOKENS), jnp.int32)
    x = _tried("embed", "[B, T, D]", functions.embed, params, ids)
    mask = jax.ShapeDtypeStruct((_ROWS, _TOKENS, _TOKENS), jnp.bool_)
    arguments = (x, ids, mask) if functions.masked else (x,)
    states = _tried("hidden", "[B, T, D]", functions.hidden, params, *arguments)
    if states.shape != x.shape:
        raise ConfigError(f"hidden returns the shape {states.shape} for embeddings {x.shape}; they must be the same")
    scores = _tried("logits", "[B, T, V]", functions.logits, params, states)
    return x.shape[2], scores.shape[2], x.dtype


def _tried(name: str, axes: str, function: Callable[..., Any], params: Any, *arguments: Any) -> Any:
    """Returns the shape and dtype of a function's result for B = 2 rows of T = 5 tokens."""
    try:
        traced, result = jax.make_jaxpr(function, return_shape=True)(params, *arguments)
    except Exception as error:  # the user's code raises anything
        shapes = ", ".join(f"{one.dtype}{list(one.shape)}" for one in arguments)
        reason = f"{type(error).__name__}: {str(error)[:500]}"
        raise ConfigError(f"{name}(params, {shapes}) fails: {reason}") from error
    if not hasattr(result, "shape") or not jnp.issubdtype(result.dtype, jnp.floating):
        raise ConfigError(f"{name} must return one array of floating-point numbers, {axes}; it returns {result!r:.200}")
    if len(result.shape) != 3 or result.shape[:2] != (_ROWS, _TOKENS):
        raise ConfigError(f"{name} returns the shape {result.shape} for ids [{_ROWS}, {_TOKENS}]; it must be {axes}")
    shapes = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    captured = [const for const in traced.consts if (np.shape(const), getattr(const, "dtype", None)) in shapes]
    if captured:
        raise ConfigError(
            f"{name} captures an array {np.shape(captured[0])}, which has the shape of a parameter and would become a"
            " constant of the compiled program: take it from the argument `params`"
        )
    return result


def _fast(tokenizer: Any) -> Tokenizer:
    """Returns a fast tokenizer of transformers.

    Raises:
      ConfigError: the tokenizer is of another kind.
    """
    import transformers

    if isinstance(tokenizer, tokenizers.Tokenizer):
        wrapped: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        return wrapped
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"tokenizer is a {type(tokenizer).__name__}; it must be a fast tokenizer of transformers, or a"
            " tokenizers.Tokenizer"
        )
    return tokenizer


def _with_ends(
    tokenizer: Tokenizer, end_ids: Sequence[int] | None, vocab_size: int
) -> tuple[Tokenizer, tuple[int, ...]]:
    """Returns the tokenizer with an EOS token, and the ids that end an answer.

    Raises:
      ConfigError: there is no such id, one is not in the vocabulary, or the tokenizer has ids that the model lacks.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ConfigError(f"the tokenizer has ids up to {largest}, but logits have {vocab_size} entries")
    if end_ids is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no EOS token: give end_ids, the ids that end an answer")
        return tokenizer, (tokenizer.eos_token_id,)
    ends = tuple(int(id_) for id_ in end_ids)
    if not ends:
        raise ConfigError("end_ids is empty: give the ids that end an answer, or None for the tokenizer's EOS token")
    for id_ in ends:
        if not 0 <= id_ <= largest or tokenizer.convert_ids_to_tokens(id_) is None:
            raise ConfigError(f"end_ids has {id_}, which is no id of the tokenizer")
    if tokenizer.eos_token_id is None:
        # Generation targets end with the EOS token. A copy, because the caller's tokenizer stays as it is.
        named: Any = copy.deepcopy(tokenizer)
        named.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
        return named, ends
    return tokenizer, ends
