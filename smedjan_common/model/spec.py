"""What a row of the menus says: MixerSpec for a sequence mixer, FfnSpec for a feed-forward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from smedjan_common.model.activations import Activations, Course
from smedjan_common.model.options import Option, options
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.model.shape import Shape

Options = TypeVar("Options", bound=Shape)  # a row's own Options


@dataclass(frozen=True)
class StateSpec:
    """One array of a decode state: its name, shape, and dtype ("compute" = the run's compute dtype).

    axis: along which positions lie, one entry for `span` of them, position p at p modulo their number; None: it sums up all of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "compute"
    axis: int | None = None
    span: int = 1


@dataclass(frozen=True)
class Tolerance:
    """Gates of the conformance suite in float32: relative differences."""

    forward: float = 1e-5
    gradient: float = 1e-5


@dataclass(frozen=True)
class MixerSpec(Generic[Options]):
    """A sequence mixer.

    options: its class of options, a Shape with more fields: what it reads of a model. ModelConfig inherits all of them.
    module, class_name: its class in smedjan_{jax,mlx}.mixers; the module of the float64 definition has the same name.
    parameters(config, layer) -> its tensors, names relative to `layers.{i}.mixer.`.
    flops(config, seq_len) -> forward FLOPs per token beyond 2 * parameters, a causal pair counted once.
    activations(config, course) -> values per token that a layer holds in training.
    state(config, batch, max_len) -> arrays of the decode state of one layer.
    validate(config) raises ConfigError.
    training: its class of options of the training, which TrainConfig inherits.
    rope_dims(config) -> how many features of a head turn by position, for each tensor that does; None: no layer of it turns.
    documents: can keep documents apart. linear: its cost per token does not grow with the length. head_size: its heads may have a size of
    their own.
    """

    name: str
    options: type[Options]
    about: str
    module: str
    class_name: str
    parameters: Callable[[Options, int], list[ParamSpec]]
    flops: Callable[[Options, int], int]
    activations: Callable[[Options, Course], Activations]
    state: Callable[[Options, int, int], list[StateSpec]]
    validate: Callable[[Options], None]
    tolerance: Tolerance = Tolerance()
    training: type | None = None
    rope_dims: Callable[[Options], tuple[int, ...]] | None = None
    documents: bool = True
    linear: bool = False
    head_size: bool = False

    @property
    def rope(self) -> bool:
        """Whether it turns by position."""
        return self.rope_dims is not None

    @property
    def own(self) -> dict[str, Option]:
        """Its options, those that it shares with other rows among them, by name."""
        return own_options(self.options)


@dataclass(frozen=True)
class FfnSpec(Generic[Options]):
    """A feed-forward: like MixerSpec, without a state.

    active(config): parameters that one token meets.
    """

    name: str
    options: type[Options]
    about: str
    module: str
    class_name: str
    parameters: Callable[[Options, int], list[ParamSpec]]
    active: Callable[[Options], int]
    activations: Callable[[Options, Course], Activations]
    validate: Callable[[Options], None]
    tolerance: Tolerance = Tolerance()

    @property
    def own(self) -> dict[str, Option]:
        """Its options by name."""
        return own_options(self.options)


def own_options(cls: type[Shape]) -> dict[str, Option]:
    """The options of a row's class that not every model has."""
    every_model = options(Shape)
    return {name: found for name, found in options(cls).items() if name not in every_model}
