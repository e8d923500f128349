"""What a finalization is told."""

import dataclasses

from jaxgpt.finalize.average import AverageConfig
from jaxgpt.finalize.encode import WeightsDtype
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.partition import MeshConfig


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """eval: a path, glob or list of them, read as the source's own stage reads it; empty is that stage's held-out data."""

    eval: str | tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The defaults that the artifact suggests to whoever generates with it."""

    sampler: SamplerConfig = SamplerConfig(temperature=0.7, top_p=0.95)
    max_new_tokens: int = 256

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"generation.max_new_tokens must be at least 1, not {self.max_new_tokens}.")


@dataclasses.dataclass(frozen=True)
class FinalizeConfig:
    """One artifact.

    init_from: the workdir of a finished training run, or an artifact. average: which parameters become one model.
    dtype: of the weights in the files. int8 has one scale per output channel, int4 one per group_size inputs of it; norms,
      biases and a reward head stay float32. Loaded, all are float32 again.
    max_loss_increase: the largest relative increase of the held-out loss, over that of init_from, with which the artifact is
      published; None does not measure it where no held-out data are at hand.
    """

    init_from: str = ""
    average: AverageConfig = AverageConfig()
    dtype: WeightsDtype = "float32"
    group_size: int = 32
    data: HeldOutConfig = HeldOutConfig()
    max_loss_increase: float | None = 0.005
    generation: GenerationConfig = GenerationConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.group_size < 2 or self.group_size % 2:
            raise ValueError(
                f"group_size must be even, not {self.group_size}; the nearest is {max(2, self.group_size + 1)}."
            )

    def check_complete(self) -> None:
        """ValueError where there is nothing to finalize."""
        if not self.init_from:
            raise ValueError("init_from is required: --config.init_from=DIR, the workdir of the run to finalize.")

    @property
    def changes_values(self) -> bool:
        """Whether the artifact's parameters are others than those of init_from."""
        return self.dtype != "float32" or self.average.kind != "none"
