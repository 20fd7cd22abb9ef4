"""The LoRA methods of a pipeline: diffusers' names, arguments and meanings.

Nothing is merged when a method returns: the next call that needs the weights brings them to what is
wanted then, and moves the tensors that change alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.errors import RequestError
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.lora.adapters import Adapters, adapters_digest
from klein_kv.runtime.lora.lora_file import WeightedAdapter, read_adapter
from klein_kv.runtime.lora.merge import WeightMerger
from klein_kv.runtime.one_at_a_time import one_at_a_time
from klein_kv.runtime.references.reference_encoder import ReferenceEncoder
from klein_kv.runtime.session import Session

__all__ = ["LoraLoader"]


class LoraLoader:
    """Loads adapters (LoRA, LoKr, LoHa, DoRA and full differences) and merges them.

    Part of `KleinKVPipeline`. Source of names and meanings: diffusers, `LoraBaseMixin` and
    `Flux2LoraLoaderMixin`.
    """

    artifacts: Path
    manifest: Manifest
    graphs: GraphSet
    session: Session
    encoder: ReferenceEncoder

    _merger: WeightMerger | None = None

    def _start_without_adapters(self) -> None:
        self._adapters = Adapters()
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
        name = self._adapters.new_name(adapter_name, replaces=hotswap)
        source: Any = pretrained_model_name_or_path_or_dict
        if not isinstance(source, Mapping):
            source = _find_file(source, weight_name)
        shapes = transformer_parameters(self.manifest.config.transformer)
        adapter = read_adapter(source, shapes, strict=strict)
        self._adapters.add(name, adapter)

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
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else None
        if weights is None:
            weights = [adapter_weights] * len(names)
        self._adapters.activate(names, [_weight(weight) for weight in weights])

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self._adapters.active

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters, by the component that they change; {} without any."""
        return {"transformer": self._adapters.names} if self._adapters.names else {}

    @one_at_a_time
    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forgets adapters; a RequestError tells of one that is not loaded."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._adapters.delete(names)

    @one_at_a_time
    def disable_lora(self) -> None:
        """Makes images without the active adapters until `enable_lora`."""
        self._adapters.enabled = False

    @one_at_a_time
    def enable_lora(self) -> None:
        """Takes back `disable_lora`."""
        self._adapters.enabled = True

    @one_at_a_time
    def unload_lora_weights(self) -> None:
        """Forgets all adapters; fused ones stay in the weights."""
        self._adapters.clear()

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
        self._adapters.fuse(adapter_names, lora_scale)

    @one_at_a_time
    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
        """Takes fused adapters out of the weights, which are bit for bit what they were."""
        _check_components(components)
        self._adapters.unfuse()

    @property
    def num_fused_loras(self) -> int:
        """Number of fused adapters."""
        return len(self._adapters.fused)

    @property
    def fused_loras(self) -> set[str]:
        """Names of fused adapters."""
        return self._adapters.fused

    def _merge_adapters(self, attention_kwargs: Mapping[str, Any] | None = None) -> None:
        """Brings the weights to what the next graphs should run with.

        Raises:
            RequestError: a scale that is no number, or weights that stop being finite.
        """
        self._bring_weights_to(self._adapters.wanted((attention_kwargs or {}).get("scale", 1.0)))

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
        self.encoder.origin = replace(self.encoder.origin, adapters=adapters_digest(wanted))

    def _warn_of_adapters(self) -> None:
        if self._merger is not None:
            self._merger.warn()


def _weight(weight: Any) -> Any:
    """One weight of `set_adapters`; None is 1."""
    if isinstance(weight, Mapping):
        if weight.keys() - {"transformer"}:
            raise RequestError(
                f"the weights of an adapter are for {sorted(weight)}, expected a number, or a dict "
                "with the key 'transformer' (blocks have no weights of their own)"
            )
        weight = weight.get("transformer")
    return 1.0 if weight is None else weight


def _check_components(components: Sequence[str]) -> None:
    if list(components) != ["transformer"]:
        raise RequestError(
            f"components is {components!r}, expected ['transformer'], which adapters change alone"
        )


def _find_file(source: str | Path, name: str | None) -> Path:
    """The file of an adapter: itself, one of a folder, or of a repository of the hub.

    Raises:
        RequestError: no such file, or more than one to choose from.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) if name is None else [path / name]
        usual = [file for file in files if file.name == "pytorch_lora_weights.safetensors"]
        files = usual or files
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise RequestError(
                f"{path} holds {len(files)} .safetensors files ({names}); name one as weight_name"
            )
        return files[0]
    if path.exists() or path.suffix or str(source).count("/") != 1:
        return path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise RequestError(
            f"{path} does not exist; to load it from the Hugging Face hub, pip install "
            "huggingface_hub"
        ) from error
    try:
        return Path(hf_hub_download(str(source), name or "pytorch_lora_weights.safetensors"))
    except Exception as error:  # of the network, of the hub, of a name
        raise RequestError(
            f"{source} is no file here, and {name or 'pytorch_lora_weights.safetensors'} cannot be "
            f"had from the repository of that name ({type(error).__name__}: {error}); give the "
            "path of a .safetensors file, or weight_name"
        ) from error
