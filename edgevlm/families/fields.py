"""One section of a `config.json` that remembers what was read: what nobody read is an error.

The first silent wrongness of own model code is a field that nobody read. So a family takes each
field it acts on, names those that are without effect here, demands the neutral value of those that
it does not act on, and `finish` refuses the rest by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from edgevlm.errors import ModelError

T = TypeVar("T")

# Bookkeeping, training and defaults of generation: any value, no effect on a forward pass.
_NAMES = """
_attn_implementation_autoset _flash_attn_2_enabled _from_model_config _name_or_path
_pad_token_id architectures attention_dropout bos_token_id chunk_size_feed_forward
decoder_start_token_id dropout dtype eos_token_id finetuning_task gradient_checkpointing
hidden_dropout id2label initializer_factor initializer_range label2id model_type
neftune_noise_alpha num_labels output_attentions output_hidden_states pad_token_id prefix
pretraining_tp problem_type return_dict sep_token_id task_specific_params tf_legacy_loss
tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache

bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
WITHOUT_EFFECT = frozenset(_NAMES.split())

# Fields that change the model unless they are absent, null or this.
NEUTRAL: dict[str, object] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "per_layer_config": {},
    "pruned_heads": {},
    "quantization_config": None,
    "tie_encoder_decoder": False,
    "tie_last_hidden_states": False,
}

# Activations as transformers names them, and as we do.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Fields:
    """The fields of one section, by name; null is the same as absent."""

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        family: str,
        where: str = "",
        file: str = "config.json",
    ) -> None:
        """Hold a section; `where` is its dotted path in the file."""
        self.family, self.where, self.file = family, where, file
        self._values = values
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def peek(self, name: str) -> object:
        """The value of a field, whatever it is, without reading it."""
        return self._values.get(name)

    def is_null(self, name: str) -> bool:
        """Whether the field is there and null, where that is not the same as absent."""
        return name in self._values and self._values[name] is None

    def take(self, name: str, kind: type[T], default: T | None = None) -> T:
        """The value of a field that this family acts on; without a default it must be there."""
        self._read.add(name)
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise self.error(
                    f"{self._path(name)} is missing, which family {self.family!r} needs"
                )
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{self._path(name)} is {value!r}, expected {kind.__name__}")
        return value

    def maybe(self, name: str, kind: type[T]) -> T | None:
        """The value of a field that this family acts on, or None."""
        self._read.add(name)
        return self.take(name, kind) if name in self else None

    def choice(self, name: str, choices: Mapping[str, T] | Sequence[T], default: str = "") -> T:
        """The meaning of a field that names one of some choices."""
        table = choices if isinstance(choices, Mapping) else {str(x): x for x in choices}
        value = self.take(name, str, default or None)
        if value not in table:
            names = ", ".join(repr(key) for key in sorted(table))
            raise ModelError(
                f"{self.file}: {self._path(name)} is {value!r}, which family {self.family!r} "
                f"lacks: it has {names}",
                hint="compile a checkpoint with one of these",
            )
        return table[value]

    def activation(self, name: str, default: str) -> str:
        """The name of ours of an activation."""
        return self.choice(name, ACTIVATIONS, default)

    def only(self, name: str, *allowed: object) -> None:
        """Refuse a field unless it is absent, null, or one of the values that change nothing."""
        self._read.add(name)
        if name in self and not any(_same(self._values[name], value) for value in allowed):
            expected = " or ".join(repr(value) for value in allowed if value is not None)
            raise ModelError(
                f"{self.file}: {self._path(name)} is {self._values[name]!r}, which family "
                f"{self.family!r} does not do" + (f": it does {expected}" if expected else ""),
                hint="compile a checkpoint without it",
            )

    def ignore(self, *names: str) -> None:
        """Name fields that are without effect here."""
        self._read.update(names)

    def error(self, clause: str) -> ModelError:
        """The error of a file that lacks something, or contradicts itself."""
        return ModelError(
            f"{self.file}: {clause}",
            hint=f"take {self.file} from the checkpoint's own repository",
        )

    def section(self, name: str) -> Fields:
        """A nested section."""
        values = self.take(name, dict)
        return Fields(values, family=self.family, where=f"{self.where}{name}.", file=self.file)

    def split(self, fields: frozenset[str]) -> Fields:
        """The fields of a section that an old config writes flat into this one."""
        self._read.update(fields)
        values = {key: value for key, value in self._values.items() if key in fields}
        return Fields(values, family=self.family, where=self.where, file=self.file)

    def finish(self) -> None:
        """Refuse every field that was not read, is not without effect, and is not neutral."""
        for name, value in NEUTRAL.items():
            self.only(name, value)
        unknown = sorted(set(self._values) - self._read - WITHOUT_EFFECT)
        if unknown:
            named = ", ".join(f"{self._path(name)} = {self._values[name]!r}" for name in unknown)
            raise ModelError(
                f"{self.file}: family {self.family!r} does not know {named}",
                hint="remove it if it has no effect on the model; else the family must learn it",
            )

    def _path(self, name: str) -> str:
        """The dotted name of a field, quoted."""
        return repr(f"{self.where}{name}")


def _same(value: object, other: object) -> bool:
    """Equal, and not a bool taken for a number."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
