"""The noise levels of a run: diffusers' flow-matching Euler schedule in numpy.

One function makes the schedule, one dataclass holds it. Every value is bitwise what diffusers'
`FlowMatchEulerDiscreteScheduler` holds after `Flux2KleinKVPipeline` has called it, float32
rounding included, so that two programs given the same noise walk the same path.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from klein_kv.errors import ArtifactError, RequestError

__all__ = ["Schedule", "empirical_mu", "make_schedule", "round_to_dtype"]

_THOUSAND = np.float32(1000.0)  # training steps; exact in float16 and bfloat16 too

# The scheduler's options as klein has them: only this branch is written here. `shift` is not among
# them: dynamic shifting does not read it.
_KLEIN_OPTIONS: dict[str, object] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "use_flow_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Noise levels of one run: `sigmas`, float32 [n+1], read-only; the last one is 0."""

    sigmas: NDArray[np.float32]

    def __post_init__(self) -> None:
        self.sigmas.flags.writeable = False

    @property
    def timesteps(self) -> NDArray[np.float32]:
        """float32 [n], `sigmas[:n]` in units of training steps (0 to 1000)."""
        timesteps: NDArray[np.float32] = self.sigmas[:-1] * _THOUSAND
        return timesteps

    @property
    def num_steps(self) -> int:
        """Number of calls of the model."""
        return len(self.sigmas) - 1

    @property
    def sigma_steps(self) -> NDArray[np.float32]:
        """float32 [n], `sigmas[i+1] - sigmas[i]`: the factor of `noise_pred` in step i.

        Source: diffusers, `FlowMatchEulerDiscreteScheduler.step`, `dt`.
        """
        steps: NDArray[np.float32] = self.sigmas[1:] - self.sigmas[:-1]
        return steps

    def model_timestep(self, i: int, dtype: str) -> np.float32:
        """The time that the transformer's sinusoidal embedding sees in step i.

        diffusers casts the timestep to the dtype of the latents, divides it by 1000 there, casts
        it to the dtype of the hidden states and multiplies it by 1000 there, before the embedding
        reads it as float32. Both dtypes are the model's. In bfloat16 the detour moves a timestep
        by up to 4 units. The rounding is that of torch on a CPU: on a GPU torch multiplies by the
        reciprocal of 1000, which in float32 may differ in the last bit.

        Source: diffusers, `Flux2KleinKVPipeline.__call__` and `Flux2Transformer2DModel.forward`.
        """
        value = round_to_dtype(self.timesteps[i : i + 1], dtype)
        value = round_to_dtype(value / _THOUSAND, dtype)
        value = round_to_dtype(value * _THOUSAND, dtype)
        return np.float32(value[0])


def round_to_dtype(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Rounds float32 values to the nearest that a type of the model holds, ties to even."""
    values = np.asarray(values, dtype=np.float32)
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):  # beyond 65504 is infinity, as in torch
            return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        # Adding just under half a unit in the last kept place carries exactly when the nearest
        # value is the upper one; the kept bit itself breaks the tie towards even.
        last_bit = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + last_bit) & np.uint32(0xFFFF0000)
        result = rounded.view(np.float32).reshape(values.shape)
        return np.where(np.isnan(values), np.float32(np.nan), result)
    raise RequestError(f"dtype is {dtype!r}, expected 'float32', 'float16' or 'bfloat16'")


def empirical_mu(image_seq_len: int, num_steps: int) -> float:
    """Shift of the schedule that suits an image of that many tokens and a number of steps.

    Two lines over the image size, fitted at 10 and at 200 steps, and a line through them over the
    number of steps; above 4300 tokens the 200-step line alone.

    Source: diffusers, `pipeline_flux2_klein_kv.compute_empirical_mu`; the order of the operations
    is kept, since it decides the last bit.
    """
    at_200 = 0.00016927 * image_seq_len + 0.45666666
    if image_seq_len > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_seq_len + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * num_steps + (at_200 - 200.0 * slope)


def make_schedule(
    scheduler_config: Mapping[str, Any],
    num_inference_steps: int,
    image_seq_len: int,
    sigmas: Sequence[float] | ArrayLike | None = None,
) -> Schedule:
    """Makes the schedule that diffusers' klein pipeline would run.

    `sigmas` are the steps' noise levels before shifting, in [0, 1]; linspace(1, 1/n, n) if None. As
    in diffusers the shift follows `num_inference_steps` even then, the number of steps `sigmas`.

    Source: diffusers, `Flux2KleinKVPipeline.__call__` (part 6) and
    `FlowMatchEulerDiscreteScheduler.set_timesteps`.

    An `ArtifactError` if the configuration is not klein's, a `RequestError` of bad arguments.
    """
    # Of an option that is absent diffusers takes what klein has, but for this one.
    options = {"use_dynamic_shifting": False, **scheduler_config}
    for key, expected in _KLEIN_OPTIONS.items():
        got = options.get(key, expected)
        if got != expected and (got or expected):  # null, false and 0 all turn an option off
            raise ArtifactError(
                f"scheduler config: {key} is {got!r}, expected {expected!r}; use the "
                "scheduler_config.json of a FLUX.2 [klein] checkpoint"
            )
    steps = num_inference_steps
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise RequestError(f"num_inference_steps is {steps!r}, expected an integer of 1 or more")
    if sigmas is None:
        values = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    else:
        values = _custom_sigmas(sigmas)
    scale = math.exp(empirical_mu(image_seq_len, int(steps)))
    with np.errstate(divide="ignore"):  # sigma 0 passes through infinity
        shifted = scale / (scale + (1 / values - 1))
    return Schedule(np.append(shifted, np.float32(0.0)))


def _custom_sigmas(sigmas: Sequence[float] | ArrayLike) -> NDArray[np.float32]:
    try:
        values = np.array(sigmas, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RequestError(f"sigmas cannot be read as numbers: {error}") from error
    if values.ndim != 1 or values.size == 0:
        raise RequestError(f"sigmas have shape {list(values.shape)}, expected a non-empty list")
    if not ((values >= 0) & (values <= 1)).all():  # false for NaN too
        raise RequestError(
            f"sigmas are {values.tolist()}, expected numbers in [0, 1]; timesteps (0 to 1000) "
            "have to be divided by 1000"
        )
    return values.astype(np.float32)
