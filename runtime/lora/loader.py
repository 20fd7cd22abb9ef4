"""The LoRA methods of a pipeline: diffusers' names, arguments and meanings.

Nothing is merged when a method returns: the next call that needs the weights brings them to what is
wanted then, and moves the tensors that change alone.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.errors import RequestError
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.lora.lora_file import Adapter, WeightedAdapter, read_adapter
from klein_kv.runtime.lora.lora_source import find_lora
from klein_kv.runtime.lora.merge import WeightMerger
from klein_kv.runtime.one_at_a_time import one_at_a_time
from klein_kv.runtime.references.reference_encoder import ReferenceEncoder
from klein_kv.runtime.session import Session

__all__ = ["LoraLoader"]


class LoraLoader:
    """Loads adapters (LoRA, LoKr, LoHa, DoRA and full differences) and merges them.

    Part of `KleinKVPipeline`. Names and meanings are those of diffusers' `LoraBaseMixin` and
    `Flux2LoraLoaderMixin`: the adapter that is loaded last is the active one, `set_adapters`
    chooses others, fused ones stay until `unfuse_lora` whatever is unloaded.
    """

    artifacts: Path
    manifest: Manifest
    graphs: GraphSet
    session: Session
    encoder: ReferenceEncoder

    def _start_without_adapters(self) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._active: dict[str, float] = {}  # weights by name, in the order of merging
        self._fused: dict[str, WeightedAdapter] = {}
        self._lora_enabled = True
        self._merger: WeightMerger | None = None
        self._merged: tuple[WeightedAdapter, ...] | None = ()
        self._touched: set[str] = set()  # names in weight tables that are not the files' own

    @one_at_a_time
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Any],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        strict: bool = True,
    ) -> None:
        """Reads an adapter and makes it the active one, at weight 1.

        Args:
            pretrained_model_name_or_path_or_dict: a .safetensors file, a folder that holds one, a
                repository of the Hugging Face hub, or tensors by name.
            adapter_name: its name; default "default_N".
            hotswap: replace the adapter of that name, and keep its weight.
            weight_name: which file of a folder or repository.
            strict: False warns of keys that match nothing of the transformer, which is an error
                else.

        Raises:
            RequestError: the file cannot be read as an adapter of this model, or a name that is in
                use; nothing has changed then.
        """
        name = self._new_name(adapter_name, replaces=hotswap)
        source: Any = pretrained_model_name_or_path_or_dict
        if not isinstance(source, Mapping):
            source = find_lora(source, weight_name)
        shapes = transformer_parameters(self.manifest.config.transformer)
        adapter = read_adapter(source, shapes, strict=strict)
        if name not in self._adapters:
            self._active = {name: 1.0}
        self._adapters[name] = adapter

    @one_at_a_time
    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Mapping[str, float] | Sequence[Any] | None = None,
    ) -> None:
        """Makes these adapters the active ones, at weights of -4 to 4 (default 1).

        A weight may be a dict with the one key "transformer", as diffusers has it.

        Raises:
            RequestError: an adapter that is not loaded, or weights that do not fit.
        """
        names = self._loaded_names(adapter_names)
        given: Any = adapter_weights
        if not isinstance(given, list | tuple):
            given = [given] * len(names)
        if len(names) != len(given):
            raise RequestError(f"{len(given)} weights for {len(names)} adapters, expected as many")
        weights = [_weight(name, x) for name, x in zip(names, given, strict=True)]
        self._active = dict(zip(names, weights, strict=True))

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self._active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters, by the component that they change; {} without any."""
        return {"transformer": list(self._adapters)} if self._adapters else {}

    @one_at_a_time
    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forgets adapters; a RequestError tells of one that is not loaded.

        Where none stays active, the first of the others is, at weight 1.
        """
        for name in self._loaded_names(adapter_names):
            self._adapters.pop(name, None)
            self._active.pop(name, None)
        if not self._active and self._adapters:
            self._active = {next(iter(self._adapters)): 1.0}

    @one_at_a_time
    def disable_lora(self) -> None:
        """Makes images without the active adapters until `enable_lora`; fused ones stay."""
        self._lora_enabled = False

    @one_at_a_time
    def enable_lora(self) -> None:
        """Takes back `disable_lora`."""
        self._lora_enabled = True

    @one_at_a_time
    def unload_lora_weights(self) -> None:
        """Forgets all adapters; fused ones stay in the weights."""
        self._adapters, self._active, self._lora_enabled = {}, {}, True

    @one_at_a_time
    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,  # noqa: ARG002 - diffusers' signature
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Makes adapters, default the active ones, a part of the weights until `unfuse_lora`.

        They stay when adapters are unloaded, and a call's scale does not change them. Values that
        are not finite are refused in any case, `safe_fusing` or not.

        Raises:
            RequestError: nothing to fuse, or another component.
        """
        _check_components(components)
        names = self._loaded_names(list(self._active) if adapter_names is None else adapter_names)
        if not names:
            raise RequestError("there is no active adapter to fuse; load one first")
        if not _is_number(lora_scale):
            raise RequestError(f"lora_scale is {lora_scale!r}, expected a number")
        for name in names:
            self._fused[name] = self._adapters[name], self._active.get(name, 1.0) * lora_scale

    @one_at_a_time
    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
        """Takes fused adapters out of the weights, which are bit for bit what they were."""
        _check_components(components)
        self._fused = {}

    @property
    def num_fused_loras(self) -> int:
        """Number of fused adapters."""
        return len(self._fused)

    @property
    def fused_loras(self) -> set[str]:
        """Names of fused adapters."""
        return set(self._fused)

    def _new_name(self, name: str | None, *, replaces: bool) -> str:
        """The name that an adapter gets: the given one, else "default_N"."""
        if name is None and not replaces:
            numbers = range(len(self._adapters), 2 * len(self._adapters) + 1)
            return next(x for n in numbers if (x := f"default_{n}") not in self._adapters)
        if not isinstance(name, str) or not name:
            raise RequestError(f"adapter_name is {name!r}, expected a text")
        if (name in self._adapters) != replaces:
            held = ", ".join(self._adapters) or "none"
            wanted = "one that is loaded" if replaces else "another one"
            raise RequestError(f"adapter_name is {name!r}, expected {wanted} (loaded: {held})")
        return name

    def _loaded_names(self, names: str | Sequence[str]) -> list[str]:
        """One name or several as a list; a `RequestError` tells of one that is not loaded."""
        listed = [names] if isinstance(names, str) else list(names)
        for name in listed:
            if name not in self._adapters:
                held = ", ".join(self._adapters) or "those that load_lora_weights loads"
                raise RequestError(f"there is no adapter {name!r}, expected some of {held}")
        return listed

    def _merge_adapters(self, attention_kwargs: Mapping[str, Any] | None = None) -> None:
        """Brings the weights to what the next graphs should run with, in order of merging.

        Raises:
            RequestError: a scale that is no number, or weights that stop being finite.
        """
        scale = (attention_kwargs or {}).get("scale", 1.0)
        if not _is_number(scale):
            raise RequestError(f"the scale of adapters is {scale!r}, expected a number")
        wanted = list(self._fused.values())
        for name, weight in self._active.items() if self._lora_enabled else ():
            adapter = self._adapters[name]
            if name not in self._fused or self._fused[name][0] is not adapter:
                wanted.append((adapter, weight * scale))
        self._bring_weights_to(tuple(x for x in wanted if x[1] != 0))

    def _bring_weights_to(self, wanted: tuple[WeightedAdapter, ...]) -> None:
        if wanted == self._merged:
            return
        if self._merger is None:
            backend = self.session.backend
            self._merger = WeightMerger(self.artifacts, self.manifest, self.graphs, backend)
        contents = self._merger.contents(wanted)
        nbytes = self._merger.nbytes(contents.keys() - self._touched)
        touched = self._touched | contents.keys()
        self._merged, self._touched = None, touched  # until all of them are what they should be
        self.session.replace_weights({name: contents.get(name) for name in touched}, nbytes)
        self._merged, self._touched = wanted, set(contents)
        self.encoder.origin = replace(self.encoder.origin, adapters=_digest(wanted))

    def _warn_of_adapters(self) -> None:
        if self._merger is not None:
            self._merger.warn()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _weight(name: str, weight: Any) -> float:
    """One weight of `set_adapters`; None is 1."""
    if isinstance(weight, Mapping):
        if weight.keys() - {"transformer"}:
            raise RequestError(
                f"the weights of an adapter are for {sorted(weight)}, expected a number, or a dict "
                "with the key 'transformer' (blocks have no weights of their own)"
            )
        weight = weight.get("transformer")
    weight = 1.0 if weight is None else weight
    if not _is_number(weight) or not -4 <= weight <= 4:
        raise RequestError(
            f"the weight of adapter {name!r} is {weight!r}, expected a number of -4 to 4"
        )
    return float(weight)


def _check_components(components: Sequence[str]) -> None:
    if list(components) != ["transformer"]:
        raise RequestError(
            f"components is {components!r}, expected ['transformer'], which adapters change alone"
        )


def _digest(adapters: Sequence[WeightedAdapter]) -> str:
    """Hex digest of adapters and weights in order; "" of none."""
    if not adapters:
        return ""
    lines = "".join(f"{adapter.digest} {weight!r}\n" for adapter, weight in adapters)
    return hashlib.sha256(lines.encode()).hexdigest()
