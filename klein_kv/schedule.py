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

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"

# Options of that scheduler whose other branch is not written here.
_UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Noise levels and model times of one run. The arrays are read-only.

    Attributes:
        sigmas: float32 [n+1], noise levels; the last one is 0.
        timesteps: float32 [n], `sigmas[:n]` in units of training steps (0 to 1000).
    """

    sigmas: NDArray[np.float32]
    timesteps: NDArray[np.float32]

    def __post_init__(self) -> None:
        for name in ("sigmas", "timesteps"):
            array = np.array(getattr(self, name))  # a copy: the caller's array stays writable
            if array.dtype != np.float32 or array.ndim != 1:
                raise RequestError(
                    f"schedule: {name} has dtype {array.dtype} and {array.ndim} dimensions, "
                    "expected a float32 vector"
                )
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if len(self.timesteps) < 1 or len(self.sigmas) != len(self.timesteps) + 1:
            raise RequestError(
                f"schedule: {len(self.sigmas)} sigmas for {len(self.timesteps)} timesteps, "
                "expected at least one timestep and one sigma more than timesteps"
            )

    @property
    def num_steps(self) -> int:
        """Number of calls of the model."""
        return len(self.timesteps)

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

        Args:
            i: Step, 0 to `num_steps - 1`.
            dtype: "float32", "float16" or "bfloat16", that of the transformer.

        Raises:
            RequestError: no such step or dtype.
        """
        if not 0 <= i < self.num_steps:
            raise RequestError(f"step is {i}, expected 0 to {self.num_steps - 1}")
        thousand = np.float32(1000.0)  # exact in all three types
        value = round_to_dtype(self.timesteps[i : i + 1], dtype)
        value = round_to_dtype(value / thousand, dtype)
        value = round_to_dtype(value * thousand, dtype)
        return np.float32(value[0])


def round_to_dtype(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Rounds float32 values to the nearest ones that a floating point type holds, ties to even.

    Args:
        values: float32 array of any shape.
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        A float32 array of the same shape. NaN stays NaN.

    Raises:
        RequestError: another dtype.
    """
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
        kept = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + kept) & np.uint32(0xFFFF0000)
        result = rounded.view(np.float32).reshape(values.shape)
        return np.where(np.isnan(values), np.float32(np.nan), result)
    raise RequestError(f"dtype is {dtype!r}, expected 'float32', 'float16' or 'bfloat16'")


def empirical_mu(image_seq_len: int, num_steps: int) -> float:
    """Shift of the schedule that suits an image size and a number of steps.

    Two lines over the image size, fitted at 10 and at 200 steps, and a line through them over the
    number of steps; above 4300 tokens the 200-step line alone.

    Source: diffusers, `pipeline_flux2_klein_kv.compute_empirical_mu`; the order of the operations
    is kept, since it decides the last bit.

    Args:
        image_seq_len: Tokens of the image to be made.
        num_steps: Number of steps.
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

    Source: diffusers, `Flux2KleinKVPipeline.__call__` (part 6) and
    `FlowMatchEulerDiscreteScheduler.set_timesteps`. Two of its habits are kept: with custom
    `sigmas` the shift still follows `num_inference_steps`, while the number of steps is that of
    `sigmas`; and `use_flow_sigmas` in the configuration sets custom `sigmas` aside.

    Args:
        scheduler_config: The checkpoint's `scheduler/scheduler_config.json`. Absent options take
            that scheduler's defaults.
        num_inference_steps: Number of steps, 1 or more.
        image_seq_len: Tokens of the image to be made: (height / 16) * (width / 16).
        sigmas: Noise levels of the steps before shifting, in [0, 1]; linspace(1, 1/n, n) if None.

    Raises:
        ArtifactError: the configuration is of another scheduler, or sets an option that is not
            supported.
        RequestError: an argument is out of range.
    """
    config = _Config.from_mapping(scheduler_config)
    steps = _count("num_inference_steps", num_inference_steps)
    mu = empirical_mu(_count("image_seq_len", image_seq_len), steps)

    values: NDArray[Any]
    if config.use_flow_sigmas:
        first, last = config.training_sigma_range()
        train_steps = config.num_train_timesteps
        # In float64 until the end, unlike the two other cases.
        values = np.linspace(first * train_steps, last * train_steps, steps) / train_steps
    elif sigmas is None:
        values = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    else:
        values = _custom_sigmas(sigmas)

    with np.errstate(divide="ignore", invalid="ignore"):  # sigma 0 passes through infinity
        if config.use_dynamic_shifting:
            scale = math.exp(mu) if config.time_shift_type == "exponential" else mu
            # diffusers raises the bracket to the power 1.0, which changes no bit.
            values = scale / (scale + (1 / values - 1))
        else:
            values = config.shift * values / (1 + (config.shift - 1) * values)
        if config.shift_terminal:
            rest = 1 - values
            values = 1 - rest / (rest[-1] / (1 - config.shift_terminal))
    shifted = values.astype(np.float32)
    if not np.isfinite(shifted).all():
        raise RequestError(
            f"the schedule of {len(shifted)} steps is not finite: {shifted.tolist()}; "
            f"shift_terminal is {config.shift_terminal}: with it the last sigma before shifting "
            "must be below 1, so one step alone is not possible"
        )
    return Schedule(
        sigmas=np.append(shifted, np.float32(0.0)),
        timesteps=shifted * np.float32(config.num_train_timesteps),
    )


@dataclass(frozen=True, slots=True)
class _Config:
    """The options of the scheduler that are supported, with diffusers' defaults."""

    num_train_timesteps: int
    shift: float
    use_dynamic_shifting: bool
    time_shift_type: str
    shift_terminal: float | None
    use_flow_sigmas: bool

    def __post_init__(self) -> None:
        steps = self.num_train_timesteps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise _config_error("num_train_timesteps", steps, "a positive integer")
        if not _is_number(self.shift) or self.shift <= 0:
            raise _config_error("shift", self.shift, "a positive number")
        if self.time_shift_type not in ("exponential", "linear"):
            raise _config_error("time_shift_type", self.time_shift_type, "exponential or linear")
        terminal = self.shift_terminal
        if terminal is not None and (not _is_number(terminal) or not 0 <= terminal < 1):
            raise _config_error("shift_terminal", terminal, "null or a number in [0, 1)")

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> "_Config":
        name = config.get("_class_name", _SCHEDULER)
        if name != _SCHEDULER:
            raise _config_error("_class_name", name, _SCHEDULER)
        for key in _UNSUPPORTED:
            if config.get(key):
                raise _config_error(key, config[key], "false: klein-kv does not implement it")
        return cls(
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            shift=config.get("shift", 1.0),
            use_dynamic_shifting=bool(config.get("use_dynamic_shifting", False)),
            time_shift_type=config.get("time_shift_type", "exponential"),
            shift_terminal=config.get("shift_terminal"),
            use_flow_sigmas=bool(config.get("use_flow_sigmas", False)),
        )

    def training_sigma_range(self) -> tuple[float, float]:
        """Highest and lowest sigma of the training schedule, as float32 arithmetic gives them.

        Source: diffusers, `FlowMatchEulerDiscreteScheduler.__init__`: without dynamic shifting the
        shift is applied here, and later once more.
        """
        steps = np.float32(self.num_train_timesteps)
        ends = np.array([steps, 1.0], dtype=np.float32) / steps
        if not self.use_dynamic_shifting:
            ends = self.shift * ends / (1 + (self.shift - 1) * ends)
        return float(ends[0]), float(ends[1])


def _config_error(key: str, got: object, expected: str) -> ArtifactError:
    return ArtifactError(
        f"scheduler config: {key} is {got!r}, expected {expected}; "
        "use the scheduler_config.json of a FLUX.2 [klein] checkpoint"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise RequestError(f"{name} is {value!r}, expected an integer of 1 or more")
    return int(value)


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
